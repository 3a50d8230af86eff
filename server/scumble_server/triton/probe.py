"""Queries a server's model itself, because Triton reports a model as ready whose process is dead."""

from __future__ import annotations

import threading
import time
from contextlib import closing

from scumble.connection import Connection
from scumble.errors import ScumbleError, Unavailable
from scumble.stats import Stats
from scumble.wire import STREAM_MODEL, UNARY_MODEL, stats_query, tensors_to_stats

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - translated, not bound
INTERVAL = 1.0
TIMEOUT = 20.0


def reachable(host: str) -> str:
    """Return an address of a server that was bound to `host`."""
    address = ANY_ADDRESS.get(host, host)
    return f"[{address}]" if ":" in address else address


def ask_stats(connection: Connection, timeout: float) -> Stats:
    """Fetch the loop's counters, through all that a request goes through. Raises Unavailable without a response in
    `timeout` seconds.
    """
    if not connection.is_ready(UNARY_MODEL, timeout):
        raise Unavailable(f"model {UNARY_MODEL} is not ready")
    for response in connection.stream(STREAM_MODEL, "", stats_query(), timeout):
        return tensors_to_stats(response)
    raise Unavailable("the server's model does not answer")


class Probe:
    """Owns a thread that asks a server once a second whether its model answers."""

    def __init__(self, host: str, grpc_port: int) -> None:
        self._url = f"{reachable(host)}:{grpc_port}"
        self._answered_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()

    def silence(self) -> float:
        """Seconds since the last answer, or since the start."""
        return time.monotonic() - self._answered_at

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        with closing(Connection(self._url)) as connection:
            while not self._ended.is_set():
                if answers(connection, TIMEOUT):
                    self._answered_at = time.monotonic()
                self._ended.wait(INTERVAL)


def answers(connection: Connection, timeout: float) -> bool:
    """Tell whether the model answers within `timeout` seconds and its threads are alive."""
    try:
        return ask_stats(connection, timeout).alive
    except ScumbleError:
        return False
