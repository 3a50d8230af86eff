"""Progress without a terminal: a line now and then, with step, loss and the time that is left."""

from __future__ import annotations

import pytest

from scumble_trainers.progress import EVERY, ProgressLines, progress, silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_when_it_begins_every_ten_seconds_and_at_the_end() -> None:
    clock, lines = Clock(), list[str]()
    report = ProgressLines(lines.append, clock)
    for step in range(1, 101):
        clock.now = step * EVERY / 20
        report("training", step, 100, f"loss {step / 1000:.4f}")
    assert lines == [
        "training: 1/100 (1%), loss 0.0010",
        "training: 21/100 (21%), loss 0.0210, 0:40 left",
        "training: 41/100 (41%), loss 0.0410, 0:30 left",
        "training: 61/100 (61%), loss 0.0610, 0:20 left",
        "training: 81/100 (81%), loss 0.0810, 0:10 left",
        "training: 100/100 (100%), loss 0.1000",
    ]


def test_a_run_that_goes_on_counts_only_its_own_steps_for_the_time_left() -> None:
    clock, lines = Clock(), list[str]()
    report = ProgressLines(lines.append, clock)
    report("training", 900, 1000)
    clock.now = EVERY
    report("training", 910, 1000)
    assert lines[-1] == "training: 910/1000 (91%), 1:30 left"


def test_stages_have_lines_of_their_own() -> None:
    lines = list[str]()
    report = ProgressLines(lines.append, Clock())
    report("latents", 8, 16)
    report("training", 1, 10)
    assert lines == ["latents: 8/16 (50%)", "training: 1/10 (10%)"]


def test_lines_go_to_stderr_of_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress() as report:
        report("latents", 8, 16)
    assert capsys.readouterr() == ("", "latents: 8/16 (50%)\n")
    with progress(wanted=False) as report:
        assert report is silent
    monkeypatch.setenv("RANK", "1")
    with progress() as report:
        assert report is silent
