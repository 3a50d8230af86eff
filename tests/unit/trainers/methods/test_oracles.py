"""What is saved draws in diffusers what it drew in training; diffusers' own loaders read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble_build.control_maps import Canny
from scumble_build.graphs.predictor import Predictor
from scumble_build.graphs.vision import ImageEncoder
from scumble_registry.formats.dreambooth import restore
from scumble_registry.formats.hypernetwork import read_record
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_trainers.base import TrainingBase, find_base
from support.every_method import TOKEN, run_method

PROMPT = f"red disc {TOKEN}"
Pixels = NDArray[np.int64]


def bare(folder: Path, **more: Any) -> Any:
    unchecked = {} if (folder / "text_encoder_2").is_dir() else {"safety_checker": None}
    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **unchecked, **more)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: Any, side: int, **more: Any) -> Pixels:
    """As the grid's only row is drawn."""
    drawn = pipeline(
        [PROMPT],
        num_inference_steps=2,
        guidance_scale=5.0,
        height=side,
        width=side,
        generator=[torch.Generator("cpu").manual_seed(0)],
        output_type="pil",
        **more,
    )
    return np.asarray(drawn.images[0]).astype(np.int64)


def drawn_in_training(out: Path, side: int) -> Pixels:
    with Image.open(out / "samples/step-000004.png") as column:
        return np.asarray(column.convert("RGB")).astype(np.int64)[:side]


def seen(base: TrainingBase, picture: Path) -> torch.Tensor:
    """The states that a hypernetwork reads of it."""
    folder = base.folder / "image_encoder"
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    return ImageEncoder(folder, folder, "cpu", torch.float32).encode([pixels]).states


def assert_same(one: Pixels, other: Pixels, without: Pixels, within: int = 1) -> None:
    """Far nearer to one another than to what the base alone draws."""
    assert np.abs(one - other).max() <= within
    assert np.abs(one - without).max() > 10 * within


@pytest.mark.parametrize("kind", [{}, {"variant": "plus", "tokens": 4, "width": 64}], ids=["base", "plus"])
def test_diffusers_loads_the_ip_adapter(base: TrainingBase, things: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    run_method("ip_adapter", base, things, tmp_path / "out", learning_rate=3e-2, **kind)
    encoder: Any = CLIPVisionModelWithProjection.from_pretrained(base.folder / "image_encoder")
    preparation = CLIPImageProcessorPil.from_pretrained(base.folder / "image_encoder")
    pipeline = bare(base.folder, image_encoder=encoder, feature_extractor=preparation)
    without = draw(pipeline, 16)
    pipeline.load_ip_adapter(str(tmp_path / "out"), subfolder="", weight_name="ip-adapter.safetensors")
    with Image.open(things / "0.png") as first:
        shown = draw(pipeline, 16, ip_adapter_image=[first.copy()])
    assert_same(drawn_in_training(tmp_path / "out", 16), shown, without)


def test_diffusers_loads_the_controlnet(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    run_method("controlnet", base, things, tmp_path / "out", learning_rate=3e-2)
    net = ControlNetModel.from_pretrained(tmp_path / "out/controlnet", local_files_only=True)
    without = draw(bare(base.folder), 16)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base.folder, controlnet=net, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    with Image.open(things / "0.png") as first:
        small = np.asarray(first.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS))
    edges = Image.fromarray(Canny().apply(small))
    assert_same(drawn_in_training(tmp_path / "out", 16), draw(pipeline, 16, image=[edges]), without)


def test_diffusers_loads_the_word(any_folder: Path, things: Path, tmp_path: Path) -> None:
    """Of SDXL one group of vectors for each encoder, as the field's files have it."""
    out = tmp_path / "out"
    run = run_method("textual_inversion", find_base(str(any_folder), tmp_path), things, out, learning_rate=1.0)
    side = run.method.material.samples.resolution
    pipeline = bare(any_folder)
    without = draw(pipeline, side)
    state: Any = load_file(out / run.method.adapter)
    if "clip_l" in state:
        for key, part in (("clip_l", ""), ("clip_g", "_2")):
            to = {
                "text_encoder": getattr(pipeline, f"text_encoder{part}"),
                "tokenizer": getattr(pipeline, f"tokenizer{part}"),
            }
            pipeline.load_textual_inversion({TOKEN: state[key]}, token=TOKEN, **to)
    else:
        pipeline.load_textual_inversion(str(out), weight_name=run.method.adapter)
    assert_same(drawn_in_training(out, side), draw(pipeline, side), without)


@pytest.mark.parametrize("delta", [False, True])
def test_diffusers_loads_the_checkpoint(base: TrainingBase, things: Path, tmp_path: Path, *, delta: bool) -> None:
    """The folder as it is saved; kept as a difference, what the registry makes of it and the base."""
    run_method("dreambooth", base, things, tmp_path / "out", save_delta=delta, text_encoder=True)
    folder = tmp_path / "out/model"
    if delta:
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert not (folder / "vae/diffusion_pytorch_model.safetensors").exists()
        assert size < sum(file.stat().st_size for file in base.folder.rglob("*.safetensors"))
        restore(folder, base.folder, tmp_path / "whole")
        folder = tmp_path / "whole"
    assert_same(drawn_in_training(tmp_path / "out", 16), draw(bare(folder), 16), draw(bare(base.folder), 16))


def test_the_predicted_lora_merged_into_diffusers_weights_draws_the_same(
    base: TrainingBase, things: Path, tmp_path: Path
) -> None:
    run_method("hypernetwork", base, things, tmp_path / "out", learning_rate=3e-2, alpha=3.0)
    record = read_record(tmp_path / "out/hypernetwork.safetensors")
    assert isinstance(record, PredictorRecord)
    states = seen(base, things / "0.png")
    pipeline = bare(base.folder)
    without = draw(pipeline, 16)
    with torch.no_grad():
        for target, (down, up, alpha) in Predictor.of(record).predict(states).items():
            layer = pipeline.unet.get_submodule(target.removeprefix("unet."))
            layer.weight += alpha / len(down) * up @ down
    assert_same(drawn_in_training(tmp_path / "out", 16), draw(pipeline, 16), without)
