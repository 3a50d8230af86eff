from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from scumble.errors import Refused
from scumble_registry import Registry
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.safetensors_header import write

BaseWriter = Callable[..., Path]


def edit(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (data | changes).items() if value != "gone"}))


def compatibility(registry: Registry, folder: Path) -> BaseCompatibility:
    found = registry.publish(folder, "demo/base").manifest.compatibility
    assert isinstance(found, BaseCompatibility)
    return found


def test_everything_is_derived_from_the_folder(registry: Registry, base: Path) -> None:
    found = compatibility(registry, base)
    assert found.family == "sd1"
    assert found.prediction_type == "epsilon"
    assert (found.latent_channels, found.sample_size, found.vae_scale) == (4, 16, 8)
    assert (found.cross_attention_dim, found.text_widths) == (8, (8,))
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    text = CLIPTextModel.from_pretrained(base / "text_encoder")
    matrices = (torch.nn.Linear, torch.nn.Conv2d)
    assert found.targets == {
        f"{component}{name}": tuple(module.weight.shape)
        for component, model in (("unet.", unet), ("text_encoder.text_model.", text))
        for name, module in model.named_modules()
        if isinstance(module, matrices)
    }


def test_both_spellings_of_the_text_encoder_give_the_same_targets(registry: Registry, write_base: BaseWriter) -> None:
    old, new = write_base("old", prefix="text_model."), write_base("new", prefix="")
    assert compatibility(registry, old).targets == compatibility(registry, new).targets


def test_v_prediction_comes_from_the_scheduler(registry: Registry, base: Path) -> None:
    edit(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert compatibility(registry, base).prediction_type == "v_prediction"


def test_a_text_encoder_of_width_1024_is_sd2(registry: Registry, write_base: BaseWriter) -> None:
    assert compatibility(registry, write_base(width=1024)).family == "sd2"


def test_two_text_encoders_are_sdxl(registry: Registry, write_base: BaseWriter) -> None:
    found = compatibility(registry, write_base(encoders=2))
    assert (found.family, found.text_widths) == ("sdxl", (8, 8))
    assert "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj" in found.targets


def test_defaults_are_the_trained_size_unless_the_folder_says_otherwise(registry: Registry, base: Path) -> None:
    plain = registry.publish(base, "demo/base").manifest.defaults
    assert plain is not None
    assert plain.model_dump() == {
        "steps": 30,
        "guidance_scale": 7.5,
        "scheduler": "ddim",
        "width": 128,
        "height": 128,
    }
    (base / "scumble.json").write_text('{"defaults": {"steps": 20, "scheduler": "euler"}}')
    said = registry.publish(base, "demo/base").manifest.defaults
    assert said is not None
    assert (said.steps, said.scheduler, said.guidance_scale) == (20, "euler", 7.5)


def test_hidden_files_belong_to_tools_and_are_left_out(registry: Registry, base: Path) -> None:
    first = registry.publish(base, "demo/base")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").write_bytes(b"\0")
    (base / ".gitattributes").write_text("* text")
    assert registry.publish(base, "demo/base") == first


def add_pickle(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")


def add_hidden_pickle(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\x80\x04 a pickle in disguise")


def add_nan(folder: Path) -> None:
    bad = write({"conv.weight": np.full((1, 1), np.nan, np.float16)}, {})
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(bad)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a git-lfs pointer": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_text(POINTER),
        "vae/diffusion_pytorch_model.safetensors is not a sound .*git-lfs pointer.*git lfs pull",
    ),
    "a pointer that nothing reads": (
        lambda f: (f / "old.safetensors").write_text(POINTER),
        "old.safetensors is not a sound .*git-lfs pointer",
    ),
    "a pointer to a pickle": (lambda f: (f / "unet/more.bin").write_text(POINTER), "unet/more.bin .*git lfs pull"),
    "a value that is none": (add_nan, "tensor conv.weight holds NaN"),
    "other weights": (add_pickle, "publish one of the two"),
    "no weights": (lambda f: (f / "unet/more.bin").write_bytes(b"nothing"), "neither safetensors nor a pickle"),
    "a pickle called README": (add_hidden_pickle, "a pickle, of which nothing was executed"),
    "code": (lambda f: (f / "pipeline.py").write_text("boom()"), "neither safetensors"),
    "a link": (lambda f: (f / "unet/link.json").symlink_to("/etc/passwd"), "link or a special file"),
    "a linked folder": (lambda f: (f / "more").symlink_to("/etc"), "is a link"),
    "a pipe": (lambda f: os.mkfifo(f / "unet/pipe.json"), "special file"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "lacks unet/config.json"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "lacks scheduler/"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "lacks tokenizer/"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "lacks text_encoder/"),
    "no VAE weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(),
        "vae has no safetensors weights",
    ),
    "a missing shard": (
        lambda f: (f / "unet/x.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "not there: b.safetensors",
    ),
    "no JSON": (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json is not JSON"),
    "a list": (lambda f: (f / "vae/config.json").write_text("[]"), "must hold a JSON object"),
    "another UNet": (lambda f: edit(f / "unet/config.json", _class_name="UNet3D"), "UNet3D"),
    "another text encoder": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "only CLIPTextModel",
    ),
    "a class of its own": (
        lambda f: edit(f / "model_index.json", unet=["my_code", "Net"]),
        "only diffusers and transformers",
    ),
    "widths that differ": (lambda f: edit(f / "unet/config.json", cross_attention_dim=768), "width 768"),
    "widths per block": (lambda f: edit(f / "unet/config.json", cross_attention_dim=[8, 4]), "one positive"),
    "no sample size": (lambda f: edit(f / "unet/config.json", sample_size="gone"), "sample_size"),
    "predicts flow": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="flow_prediction"),
        "epsilon, v_prediction, sample can be served",
    ),
    "defaults that cannot be": (
        lambda f: (f / "scumble.json").write_text('{"steps": 0}'),
        "scumble.json are not usable: steps",
    ),
    "a refiner": (lambda f: (f / "text_encoder").rename(f / "text_encoder_2"), "refiner"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_by_name_and_nothing_is_published(
    registry: Registry, base: Path, fault: str
) -> None:
    break_it, says = BROKEN[fault]
    break_it(base)
    with pytest.raises(Refused, match=says):
        registry.publish(base, "demo/base")
    assert registry.names() == ()


def test_a_base_for_itself_is_no_checkpoint_of_it(registry: Registry, base: Path) -> None:
    registry.publish(base, "demo/base")
    with pytest.raises(Refused, match="use the base itself"):
        registry.publish(base, "demo/other", base="demo/base")
