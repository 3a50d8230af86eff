"""Two Triton models, the tritonserver that runs them, and the process that supervises it.

        binaries     finds tritonserver and its Python backend         stream_body  model `scumble_stream`: owns the
        Service run_folder   one server's files on disk and in /dev/shm        unary_body   model `scumble`: one
        response per request launcher     its command line and environment                  callers      callers: a
        client, or the other model processes    its process group                                 outbox       queue of
        responses to Triton probe        checks that the model itself responds             backend      Triton's Python
        API, typed supervisor   starts, watches, restarts, stops it               watchdog     ends a stub without a
        server
    running      `with running_server(config)`                     metrics      the loop's counters for Prometheus

The left half runs in the process that the user started, the right half inside Triton's stubs.
"""
