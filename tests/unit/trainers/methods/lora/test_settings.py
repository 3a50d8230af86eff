"""Every option of a LoRA: nothing changes at first, a killed run ends in the same bytes, nonsense is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from scumble.errors import InvalidRequest
from scumble_trainers.base import find_base, load_base
from scumble_trainers.data.captions import TextStates
from scumble_trainers.method import Condition
from scumble_trainers.methods.lora.files import FILE
from scumble_trainers.methods.lora.layers import choose_layers
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.run import train

OPTIONS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"attn2.*": 2}, "alpha_pattern": {"to_q": 3}},
    "convolution": {"convolution": True, "convolution_rank": 2},
    "rank-stabilised": {"rank_stabilised": True},
    "dora": {"dora": True, "convolution": True},
    "plus": {"plus_ratio": 16, "text_encoder": True, "text_learning_rate": 1e-3},
    "average": {"ema": 0.9},
    "kohya": {"layout": "kohya"},
}


def settings(**changes: Any) -> LoraSettings:
    small: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "checkpoint_every": 2}
    return LoraSettings.model_validate(
        {**small, "sample_steps": 1, "prompts": ("red disc",), "save_dtype": "fp32"} | changes
    )


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_killed_run_ends_in_the_same_bytes(
    base_folder: Path, make_data: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    data, base, chosen = make_data(6), find_base(str(base_folder), tmp_path), settings(**options)

    def kill_at_step_3(stage: str, done: int, *_: object) -> None:
        if stage == "training" and done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(LoraTraining, base, data, tmp_path / "killed", chosen, report=kill_at_step_3)
    resumed = train(LoraTraining, base, data, tmp_path / "killed", chosen)
    whole = train(LoraTraining, base, data, tmp_path / "whole", chosen)

    assert resumed.metrics == whole.metrics
    assert resumed.metrics["before"] != resumed.metrics["after"]
    assert (tmp_path / "killed" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("options", [{}, OPTIONS["dora"], OPTIONS["rank-stabilised"]], ids=["plain", "dora", "rs"])
def test_before_the_first_step_it_predicts_what_the_base_does(
    base_folder: Path, tmp_path: Path, options: dict[str, Any], precision: str
) -> None:
    base, chosen = find_base(str(base_folder), tmp_path), settings(mixed_precision=precision, **options)
    method = LoraTraining(load_base(base, dtype=LoraTraining.weights_dtype(chosen)), chosen, base)
    base = DiffusionPipeline.from_pretrained(base_folder, torch_dtype=method.unet.dtype, local_files_only=True).unet
    noisy, states, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 16), torch.tensor([3, 900])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    with torch.no_grad(), autocast:
        predicted = method.predict(Condition(torch.tensor([0, 1]), TextStates(states, None), None), noisy, timesteps)
        expected = base(noisy.to(base.dtype), timesteps, states.to(base.dtype)).sample
    assert torch.equal(predicted, expected)


def test_factors_b_learn_faster_by_the_ratio(base_folder: Path, tmp_path: Path) -> None:
    base = find_base(str(base_folder), tmp_path)
    chosen = settings(plus_ratio=16, text_encoder=True, text_learning_rate=1e-3, dora=True)
    method = LoraTraining(load_base(base), chosen, base)
    rates = {
        (name.partition(".")[0], name.split(".lora_")[1][0]): method.learning_rate(name) for name in method.trained()
    }
    assert rates == {
        ("unet", "A"): 1e-2,
        ("unet", "B"): 0.16,
        ("unet", "m"): 1e-2,
        ("text", "A"): 1e-3,
        ("text", "B"): 0.016,
        ("text", "m"): 1e-3,
    }


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank_pattern": {"conv1": 2}}, "--rank-pattern 'conv1' matches none of the 32 trained layers"),
        ({"alpha_pattern": {"text_encoder.*": 2}}, "--alpha-pattern"),
        ({"rank_pattern": {"attn2": 2}}, "whole name, or the end of one"),
        ({"rank_pattern": {"attn2(": 2}}, "is not a regular expression"),
        ({"convolution_rank": 4}, "--convolution-rank needs --convolution"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(
    base_folder: Path, make_data: Any, tmp_path: Path, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(InvalidRequest, match=error.replace("(", r"\(")):
        train(LoraTraining, find_base(str(base_folder), tmp_path), make_data(4), tmp_path / "out", settings(**options))
    assert not (tmp_path / "out").exists()


def test_the_first_pattern_that_matches_holds() -> None:
    chosen = settings(rank_pattern={r"unet\.mid_block.*": 1, "attn2.*": 2}, rank=8, alpha=4)
    names = ["unet.mid_block.attentions.0.attn2.to_q", "unet.up.attn2.to_q", "unet.up.attn1.to_q", "unet.conv_in"]
    sizes = choose_layers(chosen, names)
    assert {name: (size.rank, size.alpha) for name, size in sizes.items()} == {
        "unet.mid_block.attentions.0.attn2.to_q": (1, 4),
        "unet.up.attn2.to_q": (2, 4),
        "unet.up.attn1.to_q": (8, 4),
    }


def test_another_layout_is_saved_without_training_again(base_folder: Path, make_data: Any, tmp_path: Path) -> None:
    data, base = make_data(4), find_base(str(base_folder), tmp_path)
    train(LoraTraining, base, data, tmp_path / "out", settings())
    steps: list[int] = []

    def count(stage: str, done: int, *_: object) -> None:
        if stage == "training":
            steps.append(done)

    train(LoraTraining, base, data, tmp_path / "out", settings(layout="kohya"), report=count)
    train(LoraTraining, base, data, tmp_path / "once", settings(layout="kohya"))
    assert not steps
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "once" / FILE).read_bytes()
