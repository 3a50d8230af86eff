"""Counts the requests between their arrival and their last event, and refuses one more than the limit."""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic

from scumble.errors import QueueFull
from scumble_server.request.ending import stopping


class OpenRequests:
    """Thread-safe. `enter` and `leave` once for each request."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._closed = False
        self._ends: deque[float] = deque(maxlen=16)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return self._count

    @property
    def closed(self) -> bool:
        return self._closed

    def enter(self) -> int:
        """Count one more and return how many are ahead of it. Raises QueueFull, or Unavailable once closed."""
        with self._lock:
            if self._closed:
                raise stopping()
            if self._count >= self._limit:
                raise QueueFull(
                    f"{self._count} requests are open, which is the limit; try again in a moment",
                    retry_after=self._seconds_per_request(),
                )
            self._count += 1
            return self._count - 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            self._ends.append(monotonic())

    def close(self) -> bool:
        """Let no more enter. Returns False if it was closed before."""
        with self._lock:
            was_closed, self._closed = self._closed, True
            return not was_closed

    def _seconds_per_request(self) -> float:
        """One place is free again after this long, as the last ends suggest; a second where nothing is known yet."""
        if len(self._ends) < 2:
            return 1.0
        return max(0.1, (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1))
