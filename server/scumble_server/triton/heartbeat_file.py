"""The loop's heartbeat, from the model's process to the supervisor's: two numbers in a file that both map.

It needs no message that a request could delay, and no free byte on the disk once it exists.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

NAME = "heartbeat"
_FORMAT = struct.Struct("<dd")
"""When it was, in seconds of the machine's monotonic clock, and the seconds until the next."""
READY_SLACK, READY_TIMES = 2.0, 2.0
"""A loop that is later than expected by more than these seconds, and this many times, is not ready."""
LOST_SLACK, LOST_TIMES = 60.0, 20.0
"""One as late as that is lost."""


class HeartbeatFile:
    """One of these writes, in the model's process; others read. A torn value lasts until the next look."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        if not self._path.exists():
            self._path.write_bytes(bytes(_FORMAT.size))
        with self._path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _FORMAT.size)

    def beat(self, expected: float) -> None:
        """Say that the loop runs, and that the next beat comes in about `expected` seconds."""
        _FORMAT.pack_into(self._map, 0, time.monotonic(), expected)

    def forget(self) -> None:
        """Forget a process that has ended."""
        self._map[:] = bytes(_FORMAT.size)

    def close(self) -> None:
        self._map.close()

    @property
    def is_fresh(self) -> bool:
        """Whether the loop is as good as its word: a step would run."""
        return self._on_time(READY_SLACK, READY_TIMES)

    @property
    def is_lost(self) -> bool:
        """Whether a loop that has ever beaten is so late that only a restart helps."""
        return self._last()[0] > 0 and not self._on_time(LOST_SLACK, LOST_TIMES)

    def age(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._last()[0]

    def _on_time(self, slack: float, times: float) -> bool:
        at, expected = self._last()
        return at > 0 and time.monotonic() - at <= slack + times * expected

    def _last(self) -> tuple[float, float]:
        at, expected = _FORMAT.unpack_from(self._map, 0)
        return at, expected
