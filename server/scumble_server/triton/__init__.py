"""The front door: two Triton models, the tritonserver that runs them, and the process that looks after it.

    binaries    where tritonserver and its Python backend are       stream_body   model `scumble_stream`: owns the Service
    run_folder  what one running server owns on disk and in shm      unary_body    model `scumble`: one answer per request
    launcher    its command line and environment                     backend       Triton's Python API, typed
    supervisor  starts, watches, restarts, stops it                  watchdog      ends a stub that nobody looks after
    running     `with running_server(config)` for tests and demos    metrics       the loop's counters for Prometheus
"""
