"""What the loop says in one process, the supervisor reads in another."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble_server.triton import heartbeat_file
from scumble_server.triton.heartbeat_file import LOST_SLACK, LOST_TIMES, READY_SLACK, READY_TIMES, HeartbeatFile


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(heartbeat_file.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("expected", [0.5, 8.0])
def test_one_writes_and_the_other_reads(tmp_path: Path, clock: list[float], expected: float) -> None:
    supervisor, model = HeartbeatFile(tmp_path), HeartbeatFile(tmp_path)
    assert not supervisor.is_fresh, "before the first beat"
    assert not supervisor.is_lost, "a base may take minutes to load"
    model.beat(expected)
    for late, fresh, lost in (
        (0, True, False),
        (READY_SLACK + READY_TIMES * expected - 0.01, True, False),
        (READY_SLACK + READY_TIMES * expected + 0.01, False, False),
        (LOST_SLACK + LOST_TIMES * expected + 0.01, False, True),
    ):
        clock[0] = 1000.0 + late
        assert (supervisor.is_fresh, supervisor.is_lost) == (fresh, lost)
        assert supervisor.age() == pytest.approx(late)
    model.beat(expected)
    assert supervisor.is_fresh
    supervisor.forget()
    assert (supervisor.is_fresh, supervisor.is_lost) == (False, False)


def test_an_idle_loop_that_stops_is_told_within_three_seconds() -> None:
    from scumble_server.denoise.heartbeat import IDLE

    assert READY_SLACK + READY_TIMES * IDLE <= 3
