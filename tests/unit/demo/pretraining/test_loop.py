from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scumble_demo.pretraining.device import step_generator
from scumble_demo.pretraining.loop import LoopConfig, learning_rate, run_stage

CONFIG = LoopConfig(steps=12, learning_rate=0.05, warmup=2, validate_every=4, save_every=4)


class Line:
    """Fits y = 3x on random points."""

    name = "line"

    def __init__(self, stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(1, 1)
        self.stop_at = stop_at

    def loss(self, step: int) -> Tensor:
        if step == self.stop_at:
            raise KeyboardInterrupt
        x = torch.randn((8, 1), generator=step_generator(7, step))
        return (self.module(x) - 3 * x).square().mean()

    def validate(self) -> dict[str, float]:
        return {"val_weight": float(next(self.module.parameters()).detach())}

    def sample(self, path: Path) -> None:
        path.write_bytes(b"")


def weights(stage: Line) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in stage.module.parameters()]


def test_a_run_that_was_killed_ends_as_the_one_that_was_not(tmp_path: Path) -> None:
    whole, killed, resumed = Line(), Line(stop_at=10), Line()
    run_stage(whole, CONFIG, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_stage(killed, CONFIG, tmp_path / "killed")
    run_stage(resumed, CONFIG, tmp_path / "killed")
    for ours, theirs in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(ours, theirs)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, second = Line(), Line(stop_at=0)
    assert run_stage(first, CONFIG, tmp_path) == run_stage(second, CONFIG, tmp_path)


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(tmp_path: Path) -> None:
    run_stage(Line(), CONFIG, tmp_path)
    longer = Line()
    after = run_stage(longer, replace(CONFIG, steps=200), tmp_path)
    assert after["val_weight"] == pytest.approx(3, abs=0.3)


def test_progress_is_kept_as_json_lines_with_samples_beside(tmp_path: Path) -> None:
    run_stage(Line(), CONFIG, tmp_path)
    assert '"val_weight"' in (tmp_path / "log.jsonl").read_text()
    assert [path.name for path in sorted(tmp_path.glob("sample-*"))] == [
        "sample-000004.png",
        "sample-000008.png",
        "sample-000012.png",
    ]


def test_the_learning_rate_rises_and_falls() -> None:
    config = LoopConfig(steps=100, learning_rate=1.0, warmup=10, final_ratio=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
