"""Files of the ControlNet family → diffusers' models, in the precision of the file, on the CPU.

A file in the original format, or a control-LoRA, has no config: its structure is the encoder of its base, so the base's
config is read. A control-LoRA's weights are the base's plus up @ down (Stability AI's control-lora; there is no alpha).
The sums are tensors of the net; the base is only read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from scumble.errors import Refused
from scumble_build.graphs.arrays import as_tensor
from scumble_build.graphs.loading import load_whole
from scumble_registry.formats.controlnet import FILE_NAME, NetWeights, is_original, read_weights
from scumble_registry.formats.safetensors_header import read_header

_EMBEDDING = "controlnet_cond_embedding."


def load_net(folder: Path, unet: Callable[[], Path]) -> ControlNetModel:
    """Load a ControlNet from a published folder; `unet` returns the base's UNet folder and is called only if needed.

    Raises Refused if weights and structure differ.
    """
    if not is_original(read_header(folder / FILE_NAME)):
        return _load(ControlNetModel, folder)
    weights = read_weights(folder / FILE_NAME)
    model = _structure(weights, unet())
    own = {name: as_tensor(values) for name, values in weights.full.items()}
    inherited = model.state_dict() if weights.needs_base else {}
    for name, (up, down) in weights.factors.items():
        base = _inherited(inherited, name)
        product = as_tensor(up).flatten(1) @ as_tensor(down).flatten(1)
        own[name] = base + product.view_as(base)
    for name, values in weights.differences.items():
        own[name] = _inherited(inherited, name) + as_tensor(values)
    encoder = {name: value for name, value in inherited.items() if not name.startswith("controlnet_")}
    return _fill(model, encoder | own)


def load_union(folder: Path) -> ControlNetUnionModel:
    """Load a union net from a published folder. Raises Refused if weights and structure differ."""
    return _load(ControlNetUnionModel, folder)


def load_t2i(folder: Path) -> T2IAdapter:
    """Load a T2I-Adapter from a published folder. Raises Refused if weights and structure differ."""
    return _load(T2IAdapter, folder)


def _load(kind: Any, folder: Path) -> Any:
    """Load a diffusers model strictly: `from_pretrained` would fill missing tensors at random."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        try:
            model = kind.from_config(config)
        except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, LookupError) as error:
            raise Refused(f"config.json does not describe a valid {kind.__name__}: {error}") from error
    return _fill(model, load_file(folder / FILE_NAME))


def _fill(model: Any, state: dict[str, Tensor]) -> Any:
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise Refused(f"the net's weights do not fit its structure: {error}") from error
    return model.eval().requires_grad_(requires_grad=False)


def _structure(weights: NetWeights, unet: Path) -> ControlNetModel:
    """Build a net with the structure of the base's encoder, and its weights if the file needs them."""
    full = weights.full
    widths = [full[f"{_EMBEDDING}conv_in.weight"].shape[0]]
    while (name := f"{_EMBEDDING}blocks.{2 * len(widths) - 1}.weight") in full:
        widths.append(full[name].shape[0])
    if weights.needs_base:
        base = load_whole(UNet2DConditionModel, unet, torch.float32)
    else:
        with torch.device("meta"):
            base = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(unet, local_files_only=True))
    with torch.device("cpu" if weights.needs_base else "meta"):
        return ControlNetModel.from_unet(
            base,
            conditioning_embedding_out_channels=tuple(widths),
            load_weights_from_unet=weights.needs_base,
            conditioning_channels=full[f"{_EMBEDDING}conv_in.weight"].shape[1],
        )


def _inherited(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise Refused(f"the net changes {name}, which the base's encoder does not have", tensor=name)
    return state[name].float()
