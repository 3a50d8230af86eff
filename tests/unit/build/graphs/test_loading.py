from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from scumble.errors import Refused
from scumble_build.graphs.loading import load_whole
from scumble_build.graphs.vision import ImageEncoder
from support.broken_models import Tensors, edit_tensors, old_text, old_vae
from support.tiny_ip import make_image_encoder

NORM = "mid_block.resnets.0.norm1.weight"
POSITIONS = "embeddings.position_embedding.weight"
UNET, TEXT, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
BROKEN: dict[str, tuple[type, str, Callable[[Tensors], object], str]] = {
    "a UNet's norm": (UNet2DConditionModel, UNET, lambda t: t.pop(NORM), f"unet lacks 1 tensor.*: {re.escape(NORM)}"),
    "a UNet's shape": (UNet2DConditionModel, UNET, lambda t: t.update({NORM: torch.zeros(7)}), "norm1.weight"),
    "a UNet's stray": (
        UNet2DConditionModel,
        UNET,
        lambda t: t.update(stray=torch.zeros(1)),
        "does not describe: stray",
    ),
    "a text's positions": (CLIPTextModel, TEXT, lambda t: t.pop(own(t, POSITIONS)), "lacks 1 tensor.*position_embed"),
    "a text's shape": (
        CLIPTextModel,
        TEXT,
        lambda t: t.update({own(t, "final_layer_norm.bias"): torch.zeros(7)}),
        "final_layer_norm.bias is 7 and not 32",
    ),
    "a text's stray": (CLIPTextModel, TEXT, lambda t: t.update(stray=torch.zeros(1)), "not describe: stray"),
    "a VAE's end": (AutoencoderKL, VAE, lambda t: t.pop("decoder.conv_out.bias"), "vae lacks .*decoder.conv_out.bias"),
}


def own(tensors: Tensors, end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_not_whole_is_refused_by_name(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    kind, file, break_it, says = BROKEN[fault]
    shutil.copytree(tiny_base, tmp_path / "base")
    edit_tensors(tmp_path / "base" / file, break_it)
    with pytest.raises(Refused, match=says):
        load_whole(kind, (tmp_path / "base" / file).parent, torch.float32)


def test_no_weights_at_all_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com")
    with pytest.raises(Refused, match=f"unet/{weights.name} is not a sound .* git-lfs pointer"):
        load_whole(UNet2DConditionModel, tmp_path / "unet", torch.float32)
    weights.unlink()
    with pytest.raises(Refused, match="unet has no weights in safetensors"):
        load_whole(UNet2DConditionModel, tmp_path / "unet", torch.float32)


def test_no_pickle_takes_the_place_of_missing_weights(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.rename(weights.with_name("other.safetensors"))
    with pytest.raises(Refused, match="unet cannot be loaded"):
        load_whole(UNet2DConditionModel, tmp_path / "unet", torch.float32)


def test_an_image_encoder_without_a_layer_is_refused(tmp_path: Path) -> None:
    folder = make_image_encoder(tmp_path / "encoder")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(Refused, match=re.escape(name)):
        ImageEncoder(folder, None, "cpu", torch.float32)


def test_old_spellings_load(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    edit_tensors(tmp_path / "base" / TEXT, old_text)
    edit_tensors(tmp_path / "base" / VAE, old_vae)
    encoder = make_image_encoder(tmp_path / "encoder")
    position_ids = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    edit_tensors(encoder / "model.safetensors", lambda tensors: tensors.update(position_ids))
    for kind, name in ((CLIPTextModel, "text_encoder"), (AutoencoderKL, "vae")):
        old = load_whole(kind, tmp_path / "base" / name, torch.float32).state_dict()
        new = load_whole(kind, tiny_base / name, torch.float32).state_dict()
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in new)
    load_whole(CLIPVisionModelWithProjection, encoder, torch.float32)
