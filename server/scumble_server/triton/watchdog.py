"""Ends an orphaned or unhealthy stub: Triton 2.51 neither restarts a dead stub nor ends an orphaned one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from scumble_server.triton.run_folder import RunFolder

INTERVAL = 0.25
GRACE = 15.0
"""Seconds between SIGTERM and SIGKILL for a tritonserver without a supervisor."""


class Watchdog:
    """Owns a thread that watches tritonserver and the supervisor, from before the base is loaded.

    If tritonserver has died, this process exits. If the supervisor has died, tritonserver gets SIGTERM and stops in
    order. If the server is about to stop, `on_stop` runs once. If `is_healthy` is false, `on_death` runs, this process
    exits, and the supervisor restarts the server.
    """

    def __init__(self, run: RunFolder) -> None:
        self.on_stop: Callable[[], None] = lambda: None
        self.on_death: Callable[[], None] = lambda: None
        self.is_healthy: Callable[[], bool] = lambda: True
        self._run = run
        self._server = os.getppid()
        run.note_stub()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching: the model is being unloaded."""
        self._ended.set()

    def _watch(self) -> None:
        abandoned_at: float | None = None
        stop_seen = False
        while not self._ended.wait(INTERVAL):
            if os.getppid() != self._server:
                self._run.remove_shared_memory()
                os._exit(1)
            if abandoned_at is None and self._run.owner_is_gone():
                abandoned_at = time.monotonic()
                self._signal_server(signal.SIGTERM)
            if abandoned_at is not None and time.monotonic() - abandoned_at > GRACE:
                self._signal_server(signal.SIGKILL)
            if not stop_seen and (abandoned_at is not None or self._run.is_stopping()):
                stop_seen = True
                threading.Thread(target=self.on_stop, name="stop", daemon=True).start()
            if not self.is_healthy() and not stop_seen:
                self.on_death()
                os._exit(1)

    def _signal_server(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._server, what)
