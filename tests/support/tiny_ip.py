"""Random IP-Adapters of every kind in h94's layout, and an image encoder, for the tiny base."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

STATES, EMBEDDING, FACE, SIDE = 48, 40, 24, 32
"""Width of the encoder's states, of its embedding, of a face's embedding; side of the pictures that it reads."""
KINDS = ("base", "full", "plus", "faceid", "faceid_plus")
Tensors = dict[str, Tensor]


def make_image_encoder(folder: Path, seed: int = 0, *, preparation: bool = False, embedding: int = EMBEDDING) -> Path:
    """17 positions; with a preparation other than CLIP's own if asked for."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=STATES,
        intermediate_size=64,
        projection_dim=embedding,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        initializer_factor=4.0,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    if preparation:
        half = [0.5] * 3
        CLIPImageProcessorPil(size=SIDE, crop_size=SIDE, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


def make_ip_adapter(
    base: Path, file: Path, kind: str, *, seed: int = 0, gain: float = 1.0, lora: int = 0, tokens: int = 4
) -> Path:
    """`gain` makes its keys and values louder; `lora` is the rank of FaceID's LoRA."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True)
    context = unet.config.cross_attention_dim
    tensors = {f"image_proj.{name}": values for name, values in projection(kind, context, tokens).items()}
    tensors |= {f"ip_adapter.{name}": values for name, values in attentions(unet, gain, lora).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: values.contiguous() for name, values in tensors.items()}, file)
    return file


def attentions(unet: UNet2DConditionModel, gain: float, lora: int) -> Tensors:
    """Counted as diffusers counts: by its own `attn_processors`."""
    tensors: Tensors = {}
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        width, context = attention.to_k.weight.shape
        if index % 2:
            tensors[f"{index}.to_k_ip.weight"] = torch.randn(width, context) * gain / context**0.5
            tensors[f"{index}.to_v_ip.weight"] = torch.randn(width, context) * gain / context**0.5
        for part, layer in zip(
            ("q", "k", "v", "out"),
            (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]),
            strict=True,
        ):
            if lora:
                out, into = layer.weight.shape
                tensors[f"{index}.to_{part}_lora.down.weight"] = torch.randn(lora, into) * 0.2
                tensors[f"{index}.to_{part}_lora.up.weight"] = torch.randn(out, lora) * 0.2
    return tensors


def projection(kind: str, context: int, tokens: int) -> Tensors:
    if kind == "base":
        return {**linear("proj", tokens * context, EMBEDDING), **norm("norm", context)}
    if kind == "full":
        return {
            **linear("proj.0", STATES, STATES),
            **linear("proj.2", context, STATES),
            **norm("proj.3", context),
        }
    if kind == "instantid":
        inner = 64
        return {"latents": torch.randn(1, tokens, inner), **resampler("", inner, 512, context)}
    if kind == "plus":
        inner = min(2 * context, 128)
        return {"latents": torch.randn(1, tokens, inner), **resampler("", inner, STATES, context)}
    face = {
        **linear("proj.0", 2 * FACE, FACE),
        **linear("proj.2", tokens * context, 2 * FACE),
        **norm("norm", context),
    }
    if kind == "faceid":
        return face
    return {**face, **resampler("perceiver_resampler.", context, STATES, context)}


def resampler(prefix: str, inner: int, width: int, context: int) -> Tensors:
    """Four layers, as diffusers can read no other number."""
    tensors = {
        **linear(f"{prefix}proj_in", inner, width),
        **linear(f"{prefix}proj_out", context, inner),
        **norm(f"{prefix}norm_out", context),
    }
    for layer in range(4):
        place = f"{prefix}layers.{layer}."
        tensors |= norm(f"{place}0.norm1", inner) | norm(f"{place}0.norm2", inner) | norm(f"{place}1.0", inner)
        tensors |= matrix(f"{place}0.to_q", 64, inner) | matrix(f"{place}0.to_kv", 128, inner)
        tensors |= matrix(f"{place}0.to_out", inner, 64)
        tensors |= matrix(f"{place}1.1", 4 * inner, inner) | matrix(f"{place}1.3", inner, 4 * inner)
    return tensors


def matrix(name: str, out: int, into: int) -> Tensors:
    return {f"{name}.weight": torch.randn(out, into) / into**0.5}


def linear(name: str, out: int, into: int) -> Tensors:
    return {**matrix(name, out, into), f"{name}.bias": torch.randn(out) * 0.1}


def norm(name: str, width: int) -> Tensors:
    return {f"{name}.weight": 1 + torch.randn(width) * 0.1, f"{name}.bias": torch.randn(width) * 0.1}


def as_diffusers_writes(tensors: Tensors) -> Tensors:
    """The layout of diffusers' own tests: a resampler's attention is called `attn`."""
    return {
        re.sub(r"(image_proj\.layers\.\d+)\.0\.to_", r"\1.attn.to_", name): values for name, values in tensors.items()
    }
