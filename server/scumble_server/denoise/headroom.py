"""Limits the model rows of a step after device memory ran out: half as many at once, later one more at a time.

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


class Headroom:
    """Knows for each group of images how many model rows fit. Used by the loop's thread alone."""

    def __init__(self) -> None:
        self._limits: dict[Hashable, _Limit] = {}

    def limit(self, group: Hashable, most: int) -> int:
        """How many model rows fit one step: at most `most`, which the executor takes."""
        limit = self._limits.get(group)
        return most if limit is None else min(limit.rows, most)

    def ran_out(self, group: Hashable, rows: int, most: int) -> None:
        """Note that a step of `rows` model rows did not fit."""
        self._limits[group] = _Limit(max(1, rows // 2), most)

    def went_well(self, group: Hashable) -> None:
        """Note that a step fitted."""
        limit = self._limits.get(group)
        if limit is None:
            return
        limit.well += 1
        if limit.well >= PATIENCE:
            limit.well, limit.rows = 0, limit.rows + 1
            if limit.rows >= limit.most:
                del self._limits[group]
