"""Renames tensors of diffusers' modules to h94's published names, which all loaders read."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_BASE = {"image_embeds": "proj"}
_PLUS = (
    (r"layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)


def projection_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the `image_proj.…` tensors of a projection; a resampler's keys and values are concatenated, keys first."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        renamed[_renamed(name)] = value
    for name in [name for name in renamed if name.endswith(".to_k.weight")]:
        values = name.replace(".to_k.", ".to_v.")
        renamed[name.replace(".to_k.", ".to_kv.")] = torch.cat([renamed.pop(name), renamed.pop(values)])
    return {f"image_proj.{name}": value for name, value in renamed.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in _PLUS:
        name = re.sub(f"^{pattern}", replacement, name)
    module, _, role = name.rpartition(".")
    return f"{_BASE.get(module, module)}.{role}" if module else role
