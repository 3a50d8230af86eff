"""Who may hold paths into the cache: a lock that every open registry shares, in every process.

Files of the cache are found by path again and again by whoever asked for them (a server reads a base's weights anew
when they were pushed out of memory), so nothing there may go while anybody has the registry open. The system releases
the lock of a process that dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Lease:
    """Shared from the beginning until `close`. One thread at a time may ask to be alone."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Is nobody else's lease open? If so, nobody's will be until the end of the `with`."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._file, fcntl.LOCK_SH)  # a lock that could not be changed may be lost
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._file, fcntl.LOCK_SH)

    def close(self) -> None:
        self._file.close()
