"""Start a server on this machine for a while, if the server package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from scumble.errors import Unavailable

GROUP = "scumble.local_server"
"""Entry point: a function (base or None) → context manager that starts a server and yields its gRPC address."""


@contextmanager
def local_server(base: str | None) -> Iterator[str]:
    """Serve `base` (or the default) from the registry at SCUMBLE_HOME; yield the gRPC address.

    Raises Unavailable where no server is installed.
    """
    entries = list(entry_points(group=GROUP))
    if not entries:
        raise Unavailable("no server is given and none is installed: give a URL, or pip install 'scumble[server]'")
    try:
        start = entries[0].load()
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"no server is given, and to start one {error.name} is missing: give a URL, "
            "or pip install 'scumble[server]'"
        ) from error
    with start(base) as address:
        yield address
