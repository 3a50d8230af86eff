"""Every training method with the least that it can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scumble_trainers.base import TrainingBase
from scumble_trainers.methods import METHODS
from scumble_trainers.run import train
from scumble_trainers.settings import TrainSettings
from scumble_trainers.steps.loop import Run

TOKEN = "<x>"
OWN: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "ip_adapter": {},
    "controlnet": {},
    "textual_inversion": {"token": TOKEN, "vectors": 2, "learning_rate": 0.1},
    "dreambooth": {"learning_rate": 1e-2},
    "hypernetwork": {"width": 16, "heads": 2, "depth": 1, "rank": 2, "a": 4, "b": 4},
}
ENTRIES = {entry.name: entry for entry in METHODS}


def make_settings(method: str, **changes: Any) -> TrainSettings:
    small = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2, "validation": 0.0}
    small |= {"prompts": ("red disc <x>",), "sample_steps": 2, "save_dtype": "fp32", **OWN[method], **changes}
    return ENTRIES[method].settings.model_validate(small)


def run_method(method: str, base: TrainingBase, data: Path, out: Path, **changes: Any) -> Run:
    """Trains, and returns the run as it is after its last step."""
    runs: list[Run] = []
    original = Run.train

    def remember(run: Run, *rest: Any) -> None:
        runs.append(run)
        original(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train", remember)
        train(ENTRIES[method].load(), base, data, out, make_settings(method, **changes))
    return runs[0]
