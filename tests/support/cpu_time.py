"""CPU time that means the same on a busy, slow or traced machine: measured beside a fixed piece of Python.

Two processes on the threads of one core take up to twice the CPU time that one takes, and a line tracer, as
`make coverage` sets one, ten times.
"""

from __future__ import annotations

import time
from collections.abc import Callable

REFERENCE_SECONDS = 0.025
"""CPU time of `_reference` on the machine for which bounds are stated: an idle core of a server of 2024."""
_TRIES = 4


def cpu_seconds(work: Callable[[], object], enough: float) -> float:
    """Return the CPU time of this thread in `work`, as if on the stated machine. The least of a few tries, as a
    collection of garbage may fall into one; a try that takes `enough` seconds or less is the last.
    """
    least = float("inf")
    for _ in range(_TRIES):
        spent = _thread_seconds(work)
        if spent > enough:
            spent /= max(1.0, _thread_seconds(_reference) / REFERENCE_SECONDS)
        least = min(least, spent)
        if least <= enough:
            break
    return least


def _thread_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _reference() -> None:
    totals: dict[tuple[int, bool], int] = {}
    for number in range(100_000):
        _add(totals, (number % 997, True), str(number))


def _add(totals: dict[tuple[int, bool], int], key: tuple[int, bool], text: str) -> None:
    totals[key] = totals.get(key, 0) + len(text)
