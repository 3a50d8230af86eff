"""A gateway in a thread of this process, for the duration of a `with` block."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from scumble.errors import Unavailable
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


def claim(host: str, port: int) -> socket.socket:
    """Bind a port of this machine; 0: any free one. Raises Unavailable."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1024)
    except OSError as error:
        bound.close()
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise Unavailable(
            f"the gateway's port {port} of {host} {why}; choose another (0: any free one)", port=port
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def running_gateway(grpc: str, bound: socket.socket) -> Iterator[str]:
    """Serve on a claimed socket, which it owns from then on; yield the address."""
    server = server_of(grpc)
    thread = threading.Thread(target=partial(server.run, sockets=[bound]), name="gateway", daemon=True)
    thread.start()
    try:
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join(2 * STOP_SECONDS)
        bound.close()
