"""SD 2.x (v-prediction) and SDXL are trained by the same code; diffusers' own pipeline is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from scumble_registry import Registry
from scumble_trainers.base import find_base
from scumble_trainers.methods.lora.files import FILE
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run

SIZES = ((64, 64), (96, 64), (64, 96), (64, 64))
PICTURES = torch.tensor([0, 3])  # of one size


def settings(**changes: Any) -> LoraSettings:
    small: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "text_encoder": True}
    small |= {"sample_steps": 1, "prompts": ("red disc",), "save_dtype": "fp32", "bucket": True, "feed_forward": True}
    return LoraSettings.model_validate(small | changes)


def inputs() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 8, 8, generator=source), torch.tensor([10, 700])


@torch.no_grad()
def predicted_by_diffusers(pipeline: Any, prompts: list[str]) -> Tensor:
    noisy, timesteps = inputs()
    if not hasattr(pipeline, "text_encoder_2"):
        states = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
        return cast(Tensor, pipeline.unet(noisy, timesteps, states).sample)
    states, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    width = pipeline.text_encoder_2.config.projection_dim
    ids = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), dtype=states.dtype, text_encoder_projection_dim=width)
    added = {"text_embeds": pooled, "time_ids": ids.repeat(2, 1)}
    return cast(Tensor, pipeline.unet(noisy, timesteps, states, added_cond_kwargs=added).sample)


@torch.no_grad()
def predicted(run: Run) -> Tensor:
    return run.method.predict_measured(PICTURES, *inputs())


def captions(run: Run) -> list[str]:
    return [run.method.material.examples[int(picture)].texts[0] for picture in PICTURES]


def test_before_the_first_step_it_predicts_what_diffusers_does(
    family_folder: Path, make_data: Any, tmp_path: Path, prepare: Callable[..., Run]
) -> None:
    run = prepare(
        LoraTraining, find_base(str(family_folder), tmp_path), make_data(4, *SIZES), tmp_path / "out", settings()
    )
    base = DiffusionPipeline.from_pretrained(family_folder, local_files_only=True)
    assert predicted(run).abs().max() > 0
    torch.testing.assert_close(predicted(run), predicted_by_diffusers(base, captions(run)), atol=1e-5, rtol=1e-4)


def test_diffusers_loads_the_result_and_predicts_the_same(
    family_folder: Path, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    original = Run.train
    monkeypatch.setattr(Run, "train", lambda run, *rest: (runs.append(run), original(run, *rest))[1])
    base = find_base(str(family_folder), tmp_path)
    result = train(LoraTraining, base, make_data(4, *SIZES), tmp_path / "out", settings())
    bare = DiffusionPipeline.from_pretrained(family_folder, local_files_only=True)
    adapted = DiffusionPipeline.from_pretrained(family_folder, local_files_only=True)
    adapted.load_lora_weights(tmp_path / "out")

    expected = predicted_by_diffusers(adapted, captions(runs[0]))
    torch.testing.assert_close(predicted(runs[0]), expected, atol=1e-5, rtol=1e-4)
    assert (expected - predicted_by_diffusers(bare, captions(runs[0]))).abs().max() > 1e-3
    assert result.metrics["after"] != result.metrics["before"]


def test_the_registry_takes_it_for_its_base(family_folder: Path, make_data: Any, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(family_folder, "tiny/base")
    base = find_base("tiny/base", tmp_path / "home")
    train(LoraTraining, base, make_data(4, (64, 64)), tmp_path / "out", settings(steps=1))
    with Registry.open(tmp_path / "home") as registry:
        version = registry.publish(tmp_path / "out" / FILE, "styles/flat", base="tiny/base")
    assert version.manifest.kind == "lora"


def test_sdxl_is_told_how_each_picture_was_cut(
    sdxl_folder: Path, make_data: Any, tmp_path: Path, prepare: Callable[..., Run]
) -> None:
    """Original height and width, the crop's top and left in the fitted picture, height and width that are trained."""
    base, chosen = find_base(str(sdxl_folder), tmp_path), {"resolution": 96}
    data = make_data(4, (96, 96), (300, 150), (96, 144), (150, 450))
    square = prepare(LoraTraining, base, data, tmp_path / "square", settings(bucket=False, **chosen))
    assert square.method.material.framing.tolist() == [
        [96, 96, 0, 0, 96, 96],
        [150, 300, 0, 48, 96, 96],
        [144, 96, 24, 0, 96, 96],
        [450, 150, 96, 0, 96, 96],
    ]
    buckets = prepare(LoraTraining, base, data, tmp_path / "buckets", settings(**chosen))
    assert buckets.method.material.framing.tolist() == [
        [96, 96, 0, 0, 96, 96],
        [150, 300, 0, 0, 64, 128],
        [144, 96, 0, 10, 128, 64],  # 85 wide when it is 128 high
        [450, 150, 32, 0, 128, 64],
    ]
