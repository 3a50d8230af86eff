"""How many model rows fit one step where device memory ran out: half as many at once, later one by one more.

What else is in memory changes from minute to minute, so what did not fit once is tried again.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

PATIENCE = 64
"""Steps that must go well before one row more is tried."""


@dataclass(slots=True)
class _Limit:
    rows: int
    most: int
    well: int = 0


class Room:
    """Of each group of rows that can share a step. Used by the loop's thread alone."""

    def __init__(self) -> None:
        self._limits: dict[Hashable, _Limit] = {}

    def limit(self, group: Hashable, most: int) -> int:
        """At most `most`, which the executor takes."""
        found = self._limits.get(group)
        return most if found is None else min(found.rows, most)

    def ran_out(self, group: Hashable, rows: int, most: int) -> None:
        """A step of `rows` model rows did not fit."""
        self._limits[group] = _Limit(max(1, rows // 2), most)

    def went_well(self, group: Hashable) -> None:
        found = self._limits.get(group)
        if found is None:
            return
        found.well += 1
        if found.well >= PATIENCE:
            found.well, found.rows = 0, found.rows + 1
            if found.rows >= found.most:
                del self._limits[group]
