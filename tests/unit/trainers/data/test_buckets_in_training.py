"""Pictures of mixed shapes with --bucket: each step shows one size, and all the promises of a run hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scumble_trainers.base import find_base
from scumble_trainers.methods.lora.files import FILE
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run

SIZES = ((40, 40), (60, 40), (40, 60), (90, 40))


def settings(**changes: Any) -> LoraSettings:
    small: dict[str, Any] = {"steps": 6, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "checkpoint_every": 3}
    small |= {"sample_steps": 1, "prompts": ("red disc",), "save_dtype": "fp32", "bucket": True, "resolution": 32}
    return LoraSettings.model_validate(small | changes)


class Killed(BaseException):
    """What no handler expects."""


def test_latents_keep_the_pictures_shapes(
    base_folder: Path, make_data: Any, tmp_path: Path, prepare: Callable[..., Run]
) -> None:
    base = find_base(str(base_folder), tmp_path)
    run = prepare(LoraTraining, base, make_data(4, *SIZES), tmp_path / "out", settings())
    latents = run.method.material.latents
    heights_and_widths = [latents.shape(index)[1:] for index in range(4)]
    assert heights_and_widths == [(16, 16), (12, 20), (20, 12), (12, 20)], "the last is longer than any size"


def test_a_killed_run_ends_in_the_same_bytes(base_folder: Path, make_data: Any, tmp_path: Path) -> None:
    data, base = make_data(12, *SIZES), find_base(str(base_folder), tmp_path)

    def kill_at_step_5(stage: str, done: int, *_: object) -> None:
        if stage == "training" and done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(LoraTraining, base, data, tmp_path / "killed", settings(), report=kill_at_step_5)
    resumed = train(LoraTraining, base, data, tmp_path / "killed", settings())
    whole = train(LoraTraining, base, data, tmp_path / "whole", settings())

    assert resumed.metrics == whole.metrics
    assert resumed.metrics["after"]["training_loss"] < resumed.metrics["before"]["training_loss"]
    assert (tmp_path / "killed" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_file_of_lines_trains_on_its_part(base_folder: Path, make_data: Any, tmp_path: Path) -> None:
    data, base = make_data(8), find_base(str(base_folder), tmp_path)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "some.jsonl").write_text("\n".join(lines[2:5]))
    result = train(
        LoraTraining, base, data / "some.jsonl", tmp_path / "out", settings(steps=1, bucket=False, resolution=16)
    )
    assert result.provenance["pictures"] == 3
