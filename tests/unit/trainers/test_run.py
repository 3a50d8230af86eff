"""Training as a whole, on a tiny random pipeline; diffusers and PEFT are the oracles for what is saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from scumble.errors import InvalidRequest
from scumble_trainers.base import TrainingBase, find_base
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.progress import silent
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run

FILE = "pytorch_lora_weights.safetensors"


def settings(**changes: Any) -> LoraSettings:
    small: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "rank": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 3,
        "sample_steps": 1,
        "prompts": ("red disc", "blue disc"),
        "save_dtype": "fp32",
    }
    return LoraSettings.model_validate(small | changes)


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> TrainingBase:
    return find_base(str(base_folder), tmp_path / "home")


def pipeline(base_folder: Path) -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(base_folder, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any) -> np.ndarray[Any, Any]:
    result = pipe("red disc", num_inference_steps=3, generator=torch.Generator("cpu").manual_seed(3), output_type="np")
    return np.asarray(result.images[0])


def digest(module: nn.Module) -> str:
    """Of the base's weights alone, whatever adapters stand beside them."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if "lora_" not in name:
            total.update(name.replace(".base_layer", "").encode() + value.numpy().tobytes())
    return total.hexdigest()


def test_the_loss_on_one_picture_falls_and_the_base_stays_as_it_was(
    base: TrainingBase, base_folder: Path, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Run] = []
    original = Run.train
    monkeypatch.setattr(Run, "train", lambda run, *rest: (trained.append(run), original(run, *rest))[1])
    untouched = pipeline(base_folder)
    one = settings(steps=40, validation=0, caption_dropout=0, checkpoint_every=40, feed_forward=True)

    result = train(LoraTraining, base, make_data(1), tmp_path / "out", one)

    assert result.metrics["after"]["training_loss"] < 0.95 * result.metrics["before"]["training_loss"]
    assert digest(trained[0].method.pipeline.unet) == digest(untouched.unet)
    assert digest(trained[0].method.pipeline.text_encoder) == digest(untouched.text_encoder)
    assert digest(trained[0].method.pipeline.vae) == digest(untouched.vae)


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(
    base: TrainingBase, make_data: Any, tmp_path: Path, text_encoder: bool
) -> None:
    data, chosen = make_data(8), settings(text_encoder=text_encoder)

    def kill_at_step_5(stage: str, done: int, *_: object) -> None:
        if stage == "training" and done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(LoraTraining, base, data, tmp_path / "killed", chosen, report=kill_at_step_5)
    steps: list[int] = []

    def count(stage: str, done: int, *_: object) -> None:
        if stage == "training":
            steps.append(done)

    resumed = train(LoraTraining, base, data, tmp_path / "killed", chosen, report=count)
    whole = train(LoraTraining, base, data, tmp_path / "whole", chosen)

    assert steps == [4, 5, 6]
    assert resumed.metrics == whole.metrics
    assert (tmp_path / "killed" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert (tmp_path / "killed/sample_grid.png").read_bytes() == (tmp_path / "whole/sample_grid.png").read_bytes()


def test_a_batch_in_parts_trains_the_same_weights(base: TrainingBase, make_data: Any, tmp_path: Path) -> None:
    data = make_data(8)
    train(LoraTraining, base, data, tmp_path / "whole", settings())
    train(LoraTraining, base, data, tmp_path / "parts", settings(accumulate=2, gradient_checkpointing=True))

    whole, parts = load_file(tmp_path / "whole" / FILE), load_file(tmp_path / "parts" / FILE)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-4) for name in whole)


def test_a_finished_run_is_returned_as_it_is_and_another_one_is_refused(
    base: TrainingBase, make_data: Any, tmp_path: Path
) -> None:
    data = make_data(4)
    first = train(LoraTraining, base, data, tmp_path / "out", settings())

    assert train(LoraTraining, base, data, tmp_path / "out", settings()) == first
    with pytest.raises(InvalidRequest, match="rank: 4 → 2"):
        train(LoraTraining, base, data, tmp_path / "out", settings(rank=2))
    assert (
        train(LoraTraining, base, data, tmp_path / "out", settings(rank=2), fresh=True).provenance["config"]["rank"]
        == 2
    )


def test_a_finished_run_can_be_trained_further(base: TrainingBase, make_data: Any, tmp_path: Path) -> None:
    data = make_data(4)
    train(LoraTraining, base, data, tmp_path / "out", settings(schedule="constant"))
    train(LoraTraining, base, data, tmp_path / "out", settings(schedule="constant", steps=8))
    train(LoraTraining, base, data, tmp_path / "once", settings(schedule="constant", steps=8))

    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "once" / FILE).read_bytes()


def test_diffusers_loads_the_file_with_its_scale(
    base: TrainingBase, base_folder: Path, make_data: Any, tmp_path: Path
) -> None:
    """B holds the scale, so ΔW is B·A of the file with or without its header, for the text encoder as well."""
    out = tmp_path / "out"
    train(LoraTraining, base, make_data(4), out, settings(alpha=10, text_encoder=True, feed_forward=True))
    bare = draw(pipeline(base_folder))
    adapted = pipeline(base_folder)
    adapted.load_lora_weights(out)

    with safe_open(out / FILE, framework="pt") as content:
        config = json.loads(content.metadata()["lora_adapter_metadata"])
        stored = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, it is no mapping
    assert config["unet.lora_alpha"] == config["text_encoder.lora_alpha"] == 4
    assert all(name.startswith(("unet.", "text_encoder.text_model.encoder.")) for name in stored)
    parts = {"unet.": adapted.unet, "text_encoder.text_model.": adapted.text_encoder}
    checked = 0
    for prefix, module in parts.items():
        for name, layer in module.named_modules():
            down = stored.get(f"{prefix}{name}.lora_A.weight")
            if down is None:
                continue
            expected = stored[f"{prefix}{name}.lora_B.weight"] @ down
            assert expected.abs().max() > 0
            torch.testing.assert_close(layer.get_delta_weight("default_0"), expected)
            checked += 2
    assert checked == len(stored)
    assert np.abs(draw(adapted) - bare).max() > 0.01


def test_two_runs_write_the_same_bytes_and_16_bits_take_half_the_room(
    base: TrainingBase, make_data: Any, tmp_path: Path
) -> None:
    data = make_data(4)
    for name, stored in (("a", "fp16"), ("b", "fp16"), ("c", "fp32")):
        train(LoraTraining, base, data, tmp_path / name, settings(steps=2, save_dtype=stored))

    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    half, full = load_file(tmp_path / "a" / FILE), load_file(tmp_path / "c" / FILE)
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert all(torch.allclose(half[name].float(), full[name], atol=1e-3) for name in full)


def test_a_checkpoint_has_the_adapter_as_it_stands_and_the_grid_a_column(
    base: TrainingBase, base_folder: Path, make_data: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(LoraTraining, base, make_data(4), out, settings(checkpoint_every=2))

    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    pipeline(base_folder).load_lora_weights(out / "checkpoints/step-000004")
    columns = sorted(path.name for path in (out / "samples").iterdir())
    assert columns == [f"step-00000{step}.png" for step in (0, 2, 4, 6)]
    with Image.open(out / "sample_grid.png") as grid:
        assert grid.width == 4 + 4 * (16 + 4)
    assert list((out / "logs").rglob("events.out.tfevents.*"))


def test_column_0_of_the_grid_is_the_base(
    base: TrainingBase, base_folder: Path, make_data: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(LoraTraining, base, make_data(4), out, settings(steps=2, sample_seed=3, sample_guidance=7.5, sample_steps=3))

    with Image.open(out / "samples/step-000000.png") as column:
        first = np.asarray(column)[:16].astype(int)
    assert np.abs(first - np.round(draw_small(base_folder) * 255)).max() <= 1


def draw_small(base_folder: Path) -> np.ndarray[Any, Any]:
    result = pipeline(base_folder)(
        ["red disc", "blue disc"],
        num_inference_steps=3,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    )
    return np.asarray(result.images[0])


@pytest.mark.parametrize(
    "changes", [{"min_snr_gamma": 5.0}, {"mixed_precision": "bf16"}, {"warmup": 3, "text_learning_rate": 1e-3}]
)
def test_options_of_the_loop_run(base: TrainingBase, make_data: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    text = "text_learning_rate" in changes
    result = train(LoraTraining, base, make_data(4), tmp_path / "out", settings(steps=2, text_encoder=text, **changes))
    assert result.metrics["after"] != result.metrics["before"]


def test_a_trigger_word_must_occur(base: TrainingBase, make_data: Any, tmp_path: Path) -> None:
    data = make_data(4)
    with pytest.raises(InvalidRequest, match="'sks'"):
        train(LoraTraining, base, data, tmp_path / "out", settings(trigger_words=("sks",)), report=silent)
    result = train(LoraTraining, base, data, tmp_path / "out", settings(steps=2, trigger_words=("Flat style",)))
    assert result.trigger_words == ("Flat style",)
