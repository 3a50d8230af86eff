"""`GET /healthz` and `/readyz` on a small port of the supervisor's own, for probes of an orchestrator.

`/healthz`: the supervisor runs. `/readyz`: a step would run now; 503 with the reason if not.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONNECTIONS = 32
"""Connections that are answered at once; more wait in the system's queue."""
PATIENCE = 2.0
"""Seconds that a connection may take to ask."""

NotReady = Callable[[], str | None]
"""Returns why no step would run now, None if one would."""


class HealthServer:
    """Owns the port and its threads until `close`."""

    def __init__(self, host: str, port: int, why_not_ready: NotReady) -> None:
        """Raises OSError if the port is taken."""
        handler = type("Handler", (_Handler,), {"why_not_ready": staticmethod(why_not_ready)})
        self._server = _Server((host, port), handler, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler], *, family: socket.AddressFamily) -> None:
        self.address_family = family
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that hangs up is nobody's fault."""


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version, sys_version = "scumble", ""
    why_not_ready: NotReady

    def do_GET(self) -> None:
        match self.path:
            case "/healthz":
                self._answer(HTTPStatus.OK, {"status": "ok"})
            case "/readyz":
                reason = self.why_not_ready()
                if reason is None:
                    self._answer(HTTPStatus.OK, {"ready": True})
                else:
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"ready": False, "reason": reason})
            case _:
                self._answer(HTTPStatus.NOT_FOUND, {"error": "there are /healthz and /readyz"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: Any) -> None:
        """Probes come every few seconds: no log."""

    def _answer(self, status: HTTPStatus, body: dict[str, object]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
