"""Measures contenders in turn, with medians after a warm-up round, and counts arithmetic with torch."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode


def machine() -> dict[str, object]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(measured[1:]), 5) for name, measured in seconds.items()}


def against(
    bare: Callable[[], object], contenders: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Return each one's median seconds and the median of its ratio to `bare`, run right before it, so that a temporary
    slowdown affects both. The first round is a warm-up.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            bare()
            middle = time.perf_counter()
            run()
            end = time.perf_counter()
            measured[name].append((end - middle, (end - middle) / (middle - start)))
    return {
        name: (statistics.median(pair[0] for pair in pairs[1:]), statistics.median(pair[1] for pair in pairs[1:]))
        for name, pairs in measured.items()
    }


@contextmanager
def count_flops() -> Iterator[list[int]]:
    """Count the floating point operations of products and convolutions with torch's counter."""
    counted = [0]
    # The counter supports only the out-of-place operators.
    in_place = {
        torch.ops.aten.addmm_: lambda _y, a, b, **_: 2 * a[0] * a[1] * b[1],
        torch.ops.aten.baddbmm_: lambda _y, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2],
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        yield counted
    counted[0] = counter.get_total_flops()
