"""Writes a LoRA's file, in one of two equivalent formats.

diffusers/PEFT: `unet.M.lora_A.weight`, `unet.M.lora_B.weight`, a DoRA's `….lora_magnitude_vector.weight`, and PEFT's
configuration in the header. Few readers read the header, and without it they use scale 1. So B is multiplied by the
scale, and the header has alpha = rank.

kohya: `lora_unet_M.lora_down.weight`, `.lora_up.weight`, `.alpha`, a DoRA's `.dora_scale`, with M's dots as '_'. Each
component (UNet, text encoder) has one alpha, its most frequent one; the other layers' B is multiplied by the rest of
their scale, because diffusers 0.42 misreads attention layers of a file whose alphas differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble.files import write_whole
from scumble_registry.compatibility import canonical_name
from scumble_trainers.base import Pipeline
from scumble_trainers.method import DTYPES
from scumble_trainers.methods.lora.settings import Layout
from scumble_trainers.settings import StoredType

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
MATRICES = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """One layer's update `scale · up @ down`, fp32 on the CPU."""

    down: Tensor  # (r, in[, k, k])
    up: Tensor  # (out, r[, 1, 1])
    scale: float
    magnitude: Tensor | None  # (out,), of a DoRA

    @property
    def rank(self) -> int:
        return len(self.down)


def save_factors(pipeline: Pipeline, folder: Path, dtype: StoredType, layout: Layout = "diffusers") -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` with the factors of PEFT's adapter in the pipeline's parts."""
    parts: dict[str, Any] = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    factors = {name: read_factors(part, name) for name, part in parts.items() if hasattr(part, "peft_config")}
    if layout == "kohya":
        tensors, metadata = kohya(factors), {"format": "pt"}
    else:
        configs = {name: parts[name].peft_config[ADAPTER].to_dict() for name in factors}
        tensors, metadata = diffusers(factors), {"format": "pt", "lora_adapter_metadata": header(factors, configs)}
    folder.mkdir(parents=True, exist_ok=True)
    # Alphas and magnitudes stay fp32: they are few, and a rounded magnitude would change a whole row.
    stored = {name: value.to(DTYPES[dtype]) if name.endswith(MATRICES) else value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / FILE, metadata)
    _order_header(folder / FILE)
    return folder / FILE


def read_factors(part: nn.Module, component: str) -> dict[str, LayerFactors]:
    """Read the factors of PEFT's adapter, by the layers' canonical names."""
    return {
        canonical_name(f"{component}.{name}"): _factors(layer)
        for name, layer in part.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _factors(layer: Any) -> LayerFactors:
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight if ADAPTER in layer.lora_magnitude_vector else None
    return LayerFactors(
        down=_plain(layer.lora_A[ADAPTER].weight),
        up=_plain(layer.lora_B[ADAPTER].weight),
        scale=float(layer.scaling[ADAPTER]),
        magnitude=None if magnitude is None else _plain(magnitude).reshape(-1),
    )


def _plain(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu()


def diffusers(parts: Mapping[str, Mapping[str, LayerFactors]]) -> dict[str, Tensor]:
    """Return the tensors in diffusers' format."""
    tensors: dict[str, Tensor] = {}
    for layers in parts.values():
        for name, layer in layers.items():
            tensors[f"{name}.lora_A.weight"] = layer.down
            tensors[f"{name}.lora_B.weight"] = layer.up * layer.scale
            if layer.magnitude is not None:
                # diffusers requires this ending for a text encoder; for a UNet it is optional.
                shape = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
                tensors[f"{name}.lora_magnitude_vector.weight"] = layer.magnitude.reshape(shape)
    return tensors


def header(parts: Mapping[str, Mapping[str, LayerFactors]], configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return PEFT's configuration of every part as JSON, in fixed order, so that the same run writes the same bytes."""
    configuration: dict[str, Any] = {}
    for part, layers in parts.items():
        own = configs[part]["r"]
        ranks = {_ending(name): layer.rank for name, layer in layers.items() if layer.rank != own}
        scale_one = {"lora_alpha": own, "use_rslora": False, "rank_pattern": ranks, "alpha_pattern": ranks}
        for key, value in {**configs[part], **scale_one}.items():
            configuration[f"{part}.{key}"] = sorted(value) if isinstance(value, set) else value
    return json.dumps(configuration, sort_keys=True)


def _ending(name: str) -> str:
    """Return a pattern for one layer, with or without a `text_model.` before its name."""
    return name.partition(".")[2].removeprefix("text_model.")


def kohya(parts: Mapping[str, Mapping[str, LayerFactors]]) -> dict[str, Tensor]:
    """Return the tensors in kohya's format; a DoRA's magnitudes are (out, 1[, 1, 1])."""
    first = "lora_te1_" if "text_encoder_2" in parts else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    tensors: dict[str, Tensor] = {}
    for part, layers in parts.items():
        alpha = Counter(layer.scale * layer.rank for layer in layers.values()).most_common(1)[0][0]
        for name, layer in layers.items():
            flat = prefixes[part] + name.partition(".")[2].replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = layer.down
            tensors[f"{flat}.lora_up.weight"] = layer.up * (layer.scale * layer.rank / alpha)
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
            if layer.magnitude is not None:
                tensors[f"{flat}.dora_scale"] = layer.magnitude.reshape(-1, *(1,) * (layer.down.ndim - 1))
    return tensors


def _order_header(file: Path) -> None:
    """Sort the keys of a file's header, which safetensors writes in random order.

    File format: 8 bytes little-endian length, the JSON header padded with spaces, the tensors' bytes.
    """
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_whole(file, len(text).to_bytes(8, "little") + text + content[start:])
