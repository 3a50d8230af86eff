"""A cache under a byte budget: it evicts entries that no lease holds, the least recently used first.

Keys are digests (and everything else that a value depends on), so an entry is never stale.

A *lease* is everything that one request holds, which is never evicted. A value that does not fit waits until other
leases are released; that takes no longer than they run, because a running request waits for nothing. If all leases that
hold something wait for each other, the last one gets QueueFull, so there is no deadlock.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from scumble.errors import QueueFull, Refused
from scumble.stats import CacheStats
from scumble_server.request.ending import stopping

Value = TypeVar("Value")
_POLL = 0.05
"""Seconds between two calls of a waiting lease's `check`."""


@dataclass(slots=True)
class _Entry:
    """An entry. Until it is `ready`, its bytes are reserved, and other leases that need it wait.

    `of` is the key of the entry that it shares memory with; it is evicted no later than that one. `drop` is called with
    the value when it is evicted.
    """

    nbytes: int
    of: Hashable = None
    holders: set[Lease] = field(default_factory=set)
    drop: Callable[[Any], None] | None = None
    value: Any = None
    ready: bool = False


class Residency:
    """The cache. Any thread may call it. `name` is the kind of memory, for messages."""

    def __init__(self, budget_bytes: int, name: str) -> None:
        self._budget = budget_bytes
        self._name = name
        self._used = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._waiting: set[Lease] = set()
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closed = False

    def open(self, check: Callable[[], None] = lambda: None) -> Lease:
        """Open a lease that holds nothing yet. `check` is called while it waits, and ends the wait by raising."""
        return Lease(self, check)

    def close(self) -> None:
        """Make all waiting and later calls of `get` raise Unavailable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Drop all values, held or not. Called by the owner when no thread uses them any more."""
        with self._changed:
            for key in [key for key, entry in self._entries.items() if entry.ready]:
                self._evict(key)

    def stats(self) -> CacheStats:
        with self._changed:
            held = sum(entry.nbytes for entry in self._entries.values() if entry.holders)
            return CacheStats(
                entries=len(self._entries),
                bytes=self._used,
                held_bytes=held,
                budget=self._budget,
                **{name: self._counts[name] for name in ("hits", "misses", "evictions", "waits")},
            )

    def _get(
        self,
        lease: Lease,
        key: Hashable,
        nbytes: int,
        make: Callable[[], Value],
        of: Hashable,
        drop: Callable[[Value], None] | None,
    ) -> Value:
        with self._changed:
            entry = self._find_or_reserve(lease, key, _Entry(nbytes, of, {lease}, drop))
            if entry.ready:
                value: Value = entry.value
                return value
        try:
            made = make()
        except BaseException:
            with self._changed:
                del self._entries[key]
                self._used -= nbytes
                self._changed.notify_all()
            raise
        with self._changed:
            entry.value, entry.ready = made, True
            self._changed.notify_all()
        return made

    def _find_or_reserve(self, lease: Lease, key: Hashable, new: _Entry) -> _Entry:
        """Return the entry, held by `lease`: a ready one, or `new`, which the caller must make."""
        waited = False
        try:
            while True:
                if self._closed:
                    raise stopping()
                entry = self._entries.get(key)
                if entry is not None and entry.ready:
                    self._counts["hits"] += 1
                    self._entries.move_to_end(key)
                    entry.holders.add(lease)
                    return entry
                if entry is None and self._make_space(lease, new.nbytes):
                    self._counts["misses"] += 1
                    self._entries[key] = new
                    self._used += new.nbytes
                    return new
                self._counts["waits"] += not waited
                waited = True
                self._wait(lease, for_space=entry is None)
        finally:
            self._waiting.discard(lease)

    def _make_space(self, lease: Lease, nbytes: int) -> bool:
        """Evict as much as needed; return whether `nbytes` fit now. Raises Refused if `lease` needs more than the
        budget.
        """
        held = sum(entry.nbytes for entry in self._entries.values() if lease in entry.holders)
        if held + nbytes > self._budget:
            raise Refused(
                f"the request needs {held + nbytes} bytes of {self._name} memory, the budget is {self._budget}; "
                "use fewer adapters or lower ranks, or start the server with a larger budget",
                needed=held + nbytes,
                budget=self._budget,
            )
        free = [key for key, entry in self._entries.items() if not entry.holders]
        reclaimable = sum(self._entries[key].nbytes for key in free)
        if self._used - reclaimable + nbytes > self._budget:
            return False
        for key in free:
            if self._used + nbytes <= self._budget:
                break
            self._evict(key)
        return True

    def _evict(self, key: Hashable) -> None:
        """Evict an entry and all that share memory with it. A lease that holds one of those also holds this, so none
        does.
        """
        if key not in self._entries:
            return
        for other in [other for other, entry in self._entries.items() if entry.of == key]:
            self._evict(other)
        entry = self._entries.pop(key)
        self._used -= entry.nbytes
        self._counts["evictions"] += 1
        if entry.drop is not None:
            entry.drop(entry.value)

    def _wait(self, lease: Lease, *, for_space: bool) -> None:
        """Wait for a change. A lease that waits for space depends on all leases that hold something; one that waits for
        a value depends on the lease that makes it, which may wait for space too.
        """
        self._waiting.add(lease)
        holders = set[Lease]().union(*(entry.holders for entry in self._entries.values()))
        if for_space and holders <= self._waiting:
            raise QueueFull(
                f"{self._name} memory is held by requests that wait for each other; try again", retry_after=1.0
            )
        self._changed.wait(_POLL)
        lease.check()

    def _release(self, lease: Lease) -> None:
        with self._changed:
            for entry in self._entries.values():
                entry.holders.discard(lease)
            self._changed.notify_all()


class Lease:
    """Everything that one request holds. Used by one thread at a time; any thread may call `release`."""

    def __init__(self, residency: Residency, check: Callable[[], None]) -> None:
        self._residency = residency
        self.check = check

    def get(
        self,
        key: Hashable,
        nbytes: int,
        make: Callable[[], Value],
        of: Hashable = None,
        drop: Callable[[Value], None] | None = None,
    ) -> Value:
        """Return the value of `key` and hold it until the release. `make` is called if it is missing, by one lease
        only.

        `of` is the key of another value, held by this lease, that it shares memory with: the two are evicted together.
        `drop` is called with the value when it is evicted, under the residency's lock.

        `nbytes` is reserved before `make` runs. If `make` raises, nothing is kept, and other leases that waited for the
        value make it themselves. Raises Refused (it can never fit), QueueFull, Unavailable, or what `check` raises.
        """
        return self._residency._get(self, key, nbytes, make, of, drop)  # noqa: SLF001 - two classes, one lock

    def release(self) -> None:
        """Release everything. May be called again."""
        self._residency._release(self)  # noqa: SLF001

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
