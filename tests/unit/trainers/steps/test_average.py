"""--ema: what is saved and measured is the moving average; training goes on from the weights themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scumble_trainers.base import find_base
from scumble_trainers.methods.lora.files import FILE
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run

STEPS, DECAY = 6, 0.6


def settings(**changes: Any) -> LoraSettings:
    small: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "checkpoint_every": 3}
    return LoraSettings.model_validate(
        {**small, "sample_steps": 1, "prompts": ("red disc",), "save_dtype": "fp32"} | changes
    )


def warmed_up(step: int) -> float:
    """diffusers' decay at update `step` (from 1): 1 - step^(-2/3), at most DECAY; the first update is copied."""
    return 0.0 if step == 1 else min(DECAY, 1 - step ** (-2 / 3))


def test_the_saved_weights_are_the_average(
    base_folder: Path, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    seen: list[dict[str, Tensor]] = []
    original = Run.train
    monkeypatch.setattr(Run, "train", lambda run, *rest: (runs.append(run), original(run, *rest))[1])

    def keep(stage: str, *_: object) -> None:
        if stage == "training":
            seen.append({name: value.detach().clone() for name, value in runs[0].method.trained().items()})

    data, base = make_data(4), find_base(str(base_folder), tmp_path)
    train(LoraTraining, base, data, tmp_path / "average", settings(ema=DECAY), report=keep)
    train(LoraTraining, base, data, tmp_path / "plain", settings())

    expected = seen[0]
    for step, weights in enumerate(seen[1:], start=2):
        decay = warmed_up(step)
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights.items()}
    saved = load_file(tmp_path / "average" / FILE)
    assert len(saved) == len(expected)
    for name, value in expected.items():
        torch.testing.assert_close(saved[name.replace(".default.", ".")], value, atol=1e-7, rtol=1e-5)
    last = load_file(tmp_path / "average" / "checkpoints" / "step-000006" / "trained.safetensors")
    assert all(torch.equal(last[name], value) for name, value in seen[-1].items()), "training goes on from the weights"
    plain = load_file(tmp_path / "plain" / FILE)
    assert all(torch.equal(plain[name.replace(".default.", ".")], value) for name, value in seen[-1].items())
    assert any(not torch.equal(plain[name], value) for name, value in saved.items())
