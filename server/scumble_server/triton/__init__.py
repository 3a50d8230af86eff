"""The front door: two Triton models, the tritonserver that runs them, and the process that looks after it.

    binaries     where tritonserver and its Python backend are     stream_body  model `scumble_stream`: owns the Service
    run_folder   what one server owns on disk and in /dev/shm      unary_body   model `scumble`: one answer per request
    launcher     its command line and environment                  callers      who asked: the wire, or the other model
    processes    its process group                                 outbox       answers on their way to Triton
    probe        does the model itself answer?                     backend      Triton's Python API, typed
    supervisor   starts, watches, restarts, stops it               watchdog     ends a stub that nobody looks after
    running      `with running_server(config)`                     metrics      the loop's counters for Prometheus

The left half runs in the process that the user started, the right half inside Triton's stubs.
"""
