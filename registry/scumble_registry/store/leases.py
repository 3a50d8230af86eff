"""Leases on the cache: a lock that every open registry shares, in every process.

A process may read files of the cache by path at any time (a server reads a base's weights again when they were
evicted from memory), so nothing there may be removed while any registry is open. The system releases the lock of a
process that dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from scumble.files import UNWRITABLE


class WorkLease:
    """A shared lock, held until `close`. One thread at a time may call `alone`.

    Who may only read can lock the file too. Where there is none and none can be made, nothing is locked: whoever is
    able to remove entries of that cache may do so meanwhile, and they are made again.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Yield whether no other lease is open; if so, none can be opened until the end of the `with`."""
        if self._file is None:
            yield False
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._file, fcntl.LOCK_SH)  # a lock whose upgrade failed may have been lost
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._file, fcntl.LOCK_SH)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _opened(path: Path) -> TextIO | None:
    try:
        return path.open("a")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
    return path.open() if path.is_file() else None
