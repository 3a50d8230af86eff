"""A server of this machine's own for as long as it is needed, where one is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from scumble.errors import Unavailable

GROUP = "scumble.local_server"
"""Entry point: a function (base or None) → context manager that starts a server and gives its gRPC address."""


@contextmanager
def local_server(base: str | None) -> Iterator[str]:
    """Serves `base` (or the default) from the registry at SCUMBLE_HOME; gives the gRPC address.

    Raises Unavailable where no server is installed.
    """
    entries = list(entry_points(group=GROUP))
    if not entries:
        raise Unavailable("no server is named and none is installed: give its URL, or pip install 'scumble[server]'")
    try:
        start = entries[0].load()
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"no server is named, and to start one {error.name} is missing: give its URL, "
            "or pip install 'scumble[server]'"
        ) from error
    with start(base) as address:
        yield address
