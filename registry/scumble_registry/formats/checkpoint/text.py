"""Convert text encoders of single files to transformers' names.

CLIP's (SD 1.x, SDXL's first) has transformers' names. OpenCLIP's (SD 2.x, SDXL's second) has query, key and value in
one matrix and the projection transposed. SD 2.x reads the penultimate layer, so the last layer and the projection are
left out, as in its files in the diffusers layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scumble_registry.formats.safetensors_header import Array

_MODEL = "text_model."
_OUTSIDE = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_UNUSED = frozenset({"logit_scale", "attn_mask", "embeddings.position_ids", "text_model.embeddings.position_ids"})
"""Tensors that sampling does not need: they are computed, or belong to training."""


@dataclass(slots=True)
class ConvertedText:
    """Tensors by transformers' names; the names of tensors that sampling does not need, and of unknown ones."""

    tensors: dict[str, Array]
    unused: list[str]
    unknown: list[str]


Convert = Callable[[Mapping[str, Array]], ConvertedText]


def plain(name: str) -> str:
    """Return a text encoder's name without the prefix `text_model.`, which transformers ≥ 5.6 leaves out."""
    return name.removeprefix(_MODEL)


def clip(tensors: Mapping[str, Array]) -> ConvertedText:
    converted = ConvertedText({}, [], [])
    for name, values in tensors.items():
        if name in _UNUSED:
            converted.unused.append(name)
        elif plain(name).startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
            converted.tensors[_MODEL + plain(name)] = values
        elif name == "text_projection.weight":
            converted.unused.append(name)
        else:
            converted.unknown.append(name)
    return converted


def open_clip(tensors: Mapping[str, Array]) -> ConvertedText:
    """Convert with the projection and all layers (SDXL's second)."""
    return _open_clip(tensors, layers=None)


def open_clip_penultimate(tensors: Mapping[str, Array]) -> ConvertedText:
    """Convert without the projection and the last layer (SD 2.x)."""
    layers = {int(match[1]) for name in tensors if (match := _BLOCK.fullmatch(name))}
    return _open_clip(tensors, layers=max(layers, default=0))


def _open_clip(tensors: Mapping[str, Array], layers: int | None) -> ConvertedText:
    converted = ConvertedText({}, [], [])
    for name, values in tensors.items():
        match = _BLOCK.fullmatch(name)
        if name in _UNUSED or (layers is not None and (name == "text_projection" or _is_last(match, layers))):
            converted.unused.append(name)
        elif name in {"text_projection", "text_projection.weight"}:
            converted.tensors["text_projection.weight"] = values.T if name == "text_projection" else values
        elif name in _OUTSIDE:
            converted.tensors[_MODEL + _OUTSIDE[name]] = values
        elif match and (parts := _of_block(match[2], values)):
            prefix = f"{_MODEL}encoder.layers.{match[1]}."
            converted.tensors |= {prefix + part: tensor for part, tensor in parts.items()}
        else:
            converted.unknown.append(name)
    return converted


def _is_last(match: re.Match[str] | None, layers: int) -> bool:
    return match is not None and int(match[1]) >= layers


def _of_block(inner: str, values: Array) -> dict[str, Array]:
    """Return one tensor of a layer, or the three that are joined in it; {} for an unknown tensor."""
    if inner in {"attn.in_proj_weight", "attn.in_proj_bias"} and len(values) % 3 == 0:
        role, width = inner.rpartition("_")[2], len(values) // 3
        return {
            f"self_attn.{part}_proj.{role}": values[i * width : (i + 1) * width]
            for i, part in enumerate(("q", "k", "v"))
        }
    module, _, role = inner.rpartition(".")
    return {f"{_INSIDE[module]}.{role}": values} if module in _INSIDE else {}
