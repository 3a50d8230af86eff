"""DoRA (Liu et al., 2402.09353): W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, by row or by column of the weight.

At strength w it is W + w (W' − W), as the webui and ComfyUI have it: at 0 the base, and several add up in any order.
With g = m / ‖W + ΔW‖ that is W, stretched by 1 + w (g − 1), and factors stretched by g. (PEFT normalises anew at
every strength, and feeds one adapter's result to the next.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from scumble_registry.formats.lora import LoraModule


def gains(weight: Tensor, module: LoraModule) -> Tensor:
    """g of one module, (out,) or (in,) float32; `weight` (out, in[, k, k]) is the base's.

    The length of a convolution's row runs over its channels and taps, that of a column over rows and taps.
    """
    assert module.magnitude is not None
    axis = module.magnitude.axis
    changed = weight.float() + delta(module).to(weight.device).view(weight.shape)
    lengths = changed.transpose(0, axis).flatten(1).norm(dim=1)
    magnitude: Tensor = torch.tensor(module.magnitude.lengths.astype("float32"), device=weight.device)
    gain: Tensor = magnitude / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return gain


def delta(module: LoraModule) -> Tensor:
    """ΔW at strength 1, (out, in·k·k) float32, in the order of the weight's own memory."""
    down = torch.tensor(module.down.astype("float32")).flatten(1)
    up = torch.tensor(module.up.astype("float32")).flatten(1)
    product: Tensor = up @ down
    return product * module.scale


def change(weight: Tensor, module: LoraModule) -> Tensor:
    """W' − W at strength 1, shaped like `weight`, float32: of a DoRA, or ΔW itself."""
    added = delta(module).to(weight.device).view(weight.shape)
    if module.magnitude is None:
        return added
    shape = [1] * weight.ndim
    shape[module.magnitude.axis] = -1
    changed: Tensor = (weight.float() + added) * gains(weight, module).view(shape) - weight.float()
    return changed
