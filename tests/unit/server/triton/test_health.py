"""What an orchestrator's probes get."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from scumble_server.triton.health import CONNECTIONS, HealthServer

HOST = "127.0.0.1"


class Health:
    """A health server, and the reason that it gives."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._server = HealthServer(HOST, 0, lambda: self.reason)
        self.port = self._server._server.server_address[1]
        self.close = self._server.close

    def get(self, path: str, method: str = "GET") -> tuple[int, Any]:
        call = urllib.request.Request(f"http://{HOST}:{self.port}{path}", method=method)
        try:
            with urllib.request.urlopen(call, timeout=10) as response:
                return response.status, json.loads(response.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")


@pytest.fixture
def health() -> Iterator[Health]:
    made = Health()
    yield made
    made.close()


def test_readiness_follows_the_supervisor(health: Health) -> None:
    assert health.get("/readyz") == (200, {"ready": True})
    health.reason = "the loop has not been heard of for 4.2 s"
    assert health.get("/readyz") == (503, {"ready": False, "reason": health.reason})
    assert health.get("/readyz", "HEAD") == (503, None)
    assert health.get("/healthz") == (200, {"status": "ok"}), "the process itself is well"
    assert health.get("/other")[0] == 404


def test_connections_that_ask_nothing_hold_nobody_up_for_long(health: Health) -> None:
    with ExitStack() as open_sockets:
        for _ in range(CONNECTIONS + 4):
            open_sockets.enter_context(socket.create_connection((HOST, health.port)))
        start = time.monotonic()
        assert health.get("/healthz")[0] == 200
        assert time.monotonic() - start < 9


def test_a_taken_port_is_an_error(health: Health) -> None:
    with pytest.raises(OSError, match="in use"):
        HealthServer(HOST, health.port, lambda: None)
