"""Totals of the loop, counted by many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from scumble_server.denoise.counters import Counters


def test_nothing_is_lost_between_threads() -> None:
    counters = Counters()

    def work(index: int) -> None:
        counters.add("requests")
        counters.add("images", 2)
        counters.step(1 + index % 2, 4, mixed=index % 4 == 0, seconds=0.25)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    stats = counters.snapshot()
    assert (stats.requests, stats.images, stats.failed) == (400, 800, 0)
    assert (stats.steps, stats.rows, stats.mixed_steps) == (400, 1600, 100)
    assert stats.batch_sizes == {1: 200, 2: 200}
    assert stats.step_seconds == 100.0


def test_a_snapshot_stays_what_it_was() -> None:
    counters = Counters()
    before = counters.snapshot()
    counters.add("failed")
    assert (before.failed, counters.snapshot().failed) == (0, 1)
