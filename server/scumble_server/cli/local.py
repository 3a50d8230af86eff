"""A server of this machine's own for one command: what the client's `scumble.local_server` entry point names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scumble_server.config import ServerConfig
from scumble_server.triton.running import running_server

DEFAULT_BASE = "scumble/demo"


@contextmanager
def local_server(base: str | None) -> Iterator[str]:
    """Serve `base` from `SCUMBLE_HOME` on free loopback ports; gives the gRPC address. Raises as `running_server`."""
    with running_server(ServerConfig(base=base or DEFAULT_BASE)) as server:
        yield server.grpc_url
