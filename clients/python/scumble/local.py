"""The server that commands use when none is named: one at the default address, or one that is started for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from scumble.client import DEFAULT_URL, Client
from scumble.errors import ScumbleError, Unavailable

GROUP = "scumble.local_server"
"""Entry point: a function (base or None) → context manager that starts a server and yields its gRPC address."""


PROBE_TIMEOUT = 2.0
"""Seconds in which a server at the default address must answer. Where none listens, the answer comes at once."""


def default_server() -> str | None:
    """Return the default address if a Scumble server there is ready, else None."""
    with Client(DEFAULT_URL, timeout=PROBE_TIMEOUT) as client:
        try:
            return DEFAULT_URL if client.health().ready else None
        except ScumbleError:
            return None


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
