"""Counts what the loop has done since it started, for stats and metrics."""

from __future__ import annotations

import threading
from collections import Counter

from scumble.stats import LoopStats

NAMES = ("requests", "images", "failed", "steps", "rows", "mixed_steps", "failed_steps", "out_of_memory")


class Counters:
    """Thread-safe totals."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._step_seconds = 0.0

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._totals[name] += amount

    def step(self, images: int, model_rows: int, mixed: bool, seconds: float) -> None:
        """One pass through the denoiser for `images` images; `mixed`: not all had the same adapters."""
        with self._lock:
            self._totals["steps"] += 1
            self._totals["rows"] += model_rows
            self._totals["mixed_steps"] += mixed
            self._batch_sizes[images] += 1
            self._step_seconds += seconds

    def snapshot(self) -> LoopStats:
        with self._lock:
            return LoopStats(
                **{name: self._totals[name] for name in NAMES},
                batch_sizes={size: self._batch_sizes[size] for size in sorted(self._batch_sizes)},
                step_seconds=round(self._step_seconds, 6),
            )
