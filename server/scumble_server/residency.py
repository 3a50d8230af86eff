"""What is loaded: records and bound factor sets in host memory, under one byte budget, least recently used first.

Keys are digests, so an entry can never be stale. A set that a running row still holds stays alive with that
row even when it is forgotten here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Residency:
    """A thread-safe LRU. Each key is made once, also when several threads ask at the same time."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._used = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The entry of `key`, made if it is not there. What `make` raises is raised, and nothing is kept."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                value: Value = self._entries[key][0]
                return value
            value = make()
            nbytes = size(value)
            self._entries[key] = (value, nbytes)
            self._used += nbytes
            while self._used > self._budget and len(self._entries) > 1:
                _, (_, freed) = self._entries.popitem(last=False)
                self._used -= freed
            return value
