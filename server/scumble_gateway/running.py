"""A gateway in a thread of this process, for the duration of a `with` block."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from scumble.addresses import bind
from scumble_gateway.app import create_app
from scumble_gateway.protocol import BoundedProtocol
from scumble_gateway.upstream import Upstream

IDLE_SECONDS = 15
MOST_CONNECTIONS = 2000
STOP_SECONDS = 3
"""Until requests that are being drawn are cancelled, once it is to stop."""


def server_of(grpc: str) -> uvicorn.Server:
    """Make the HTTP server in front of the model at `grpc`. Its `run` takes the sockets to listen on."""
    return uvicorn.Server(
        uvicorn.Config(
            lambda: create_app(Upstream(grpc)),
            factory=True,  # within the loop, to which the channel belongs
            http=BoundedProtocol,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
            limit_concurrency=MOST_CONNECTIONS,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Bind a port, 0: any free one, and let connections wait there for the server. Raises Unavailable."""
    bound = bind(host, "gateway", port)
    bound.listen(MOST_CONNECTIONS)
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def running_gateway(grpc: str, bound: socket.socket) -> Iterator[str]:
    """Serve on a listening socket, which it owns from then on; yield the address."""
    server = server_of(grpc)
    thread = threading.Thread(target=partial(server.run, sockets=[bound]), name="gateway", daemon=True)
    thread.start()
    try:
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join(2 * STOP_SECONDS)
        bound.close()
