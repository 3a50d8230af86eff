"""What is loaded, under a byte budget, least recently used first. Keys are digests, so an entry is never stale."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Self, TypeVar

from scumble.errors import Refused

Value = TypeVar("Value")


class Residency:
    """Thread-safe; an entry stays as long as a lease holds it."""

    def __init__(self, budget_bytes: int, name: str) -> None:
        self._budget, self._name = budget_bytes, name
        self._used = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._pins: Counter[Hashable] = Counter()
        self._lock = threading.RLock()

    def open(self) -> Lease:
        return Lease(self)

    def close(self) -> None:
        """End whoever waits for room."""

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {"entries": len(self._entries), "bytes": self._used, "budget": self._budget}

    def _get(self, key: Hashable, nbytes: int, make: Callable[[], Value], *, pin: bool) -> Value:
        with self._lock:
            if key not in self._entries:
                if nbytes > self._budget:
                    raise Refused(f"{nbytes} bytes of {self._name} memory are needed, the budget is {self._budget}")
                while self._used + nbytes > self._budget and (old := self._oldest()) is not None:
                    self._used -= self._entries.pop(old)[1]
                self._entries[key] = (make(), nbytes)
                self._used += nbytes
            self._entries.move_to_end(key)
            self._pins[key] += pin
            value: Value = self._entries[key][0]
            return value

    def _oldest(self) -> Hashable | None:
        return next((key for key in self._entries if not self._pins[key]), None)

    def _unpin(self, keys: set[Hashable]) -> None:
        with self._lock:
            for key in keys:
                self._pins[key] -= 1


class Lease:
    """Everything that one request holds."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._held: set[Hashable] = set()

    def get(self, key: Hashable, nbytes: int, make: Callable[[], Value]) -> Value:
        value = self._residency._get(key, nbytes, make, pin=key not in self._held)  # noqa: SLF001
        self._held.add(key)
        return value

    def release(self) -> None:
        held, self._held = self._held, set()
        self._residency._unpin(held)  # noqa: SLF001

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
