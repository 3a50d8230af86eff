"""Computes what one module of a LoRA's record changes in one layer of the base: W' − W at weight 1.

At weight w the layer has W + w (W' − W), for every algorithm, as in the webui and ComfyUI: 0 is the base, and several
adapters add up in any order, each against the base. (PEFT normalises a DoRA anew at every weight, and feeds one
adapter's result to the next.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.arrays import as_tensor
from scumble_registry.formats.lora import Module
from scumble_registry.formats.lora.record import Dense, Gain, Kronecker, LoraModule, Pair, Product, Rotation
from scumble_registry.formats.safetensors_header import Array


def change(weight: Tensor, module: Module) -> Tensor:
    """W' − W, shaped like `weight`, float32."""
    added = delta(weight, module)
    if module.magnitude is None:
        return added
    gain = gains(weight, module).view(_on_axis(weight, module.magnitude.axis))
    changed: Tensor = (weight.float() + added) * gain - weight.float()
    return changed


def gains(weight: Tensor, module: Module) -> Tensor:
    """DoRA's (Liu et al., 2402.09353) m / ‖W + ΔW‖ of one module, (out,) or (in,) float32.

    The length of a convolution's row runs over its channels and taps, that of a column over rows and taps.
    """
    assert module.magnitude is not None
    changed = weight.float() + delta(weight, module)
    lengths = changed.transpose(0, module.magnitude.axis).flatten(1).norm(dim=1)
    gain: Tensor = tensor(module.magnitude.lengths, weight) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return gain


def bias_change(bias: Tensor, module: Module) -> Tensor | None:
    """b' − b, float32, or None."""
    added = None if module.bias is None else tensor(module.bias, bias)
    if isinstance(module, Gain) and module.of_bias is not None:
        scaled = tensor(module.of_bias, bias) * bias.float()
        added = scaled if added is None else added + scaled
    return added


def delta(weight: Tensor, module: Module) -> Tensor:
    """ΔW before a DoRA's magnitudes, shaped like `weight` (out, in[, k, k]), or (channels,) of a norm."""
    if isinstance(module, Gain):
        return weight.float() * tensor(module.values, weight).view(_on_axis(weight, module.axis))
    if isinstance(module, Rotation):
        return _turned(weight.float(), module) - weight.float()
    shape = module.shape
    added = (
        torch.zeros_like(weight, dtype=torch.float32) if shape is None else _like(weight, _plain(weight, module), shape)
    )
    if isinstance(module, LoraModule) and module.inner is not None:
        mixed = torch.einsum("oi...,ij->oj...", weight.float(), _product(weight, module.inner))
        added = added + module.scale * mixed
    return added


def _plain(like: Tensor, module: LoraModule | Product | Kronecker | Dense) -> Tensor:
    """Compute a change that does not depend on W, in the order of W's memory."""
    match module:
        case LoraModule():
            return _product(like, Pair(module.up, module.down)) * module.scale
        case Product():
            return _product(like, module.first) * _product(like, module.second) * module.scale
        case Kronecker():
            left, right = tensor(module.left, like), tensor(module.right, like)
            return torch.kron(left.view(*left.shape, *(1,) * (right.ndim - 2)), right)
        case Dense():
            assert module.delta is not None
            return tensor(module.delta, like)


def _on_axis(weight: Tensor, axis: int) -> list[int]:
    """The shape of a vector that lies along one axis of the weight."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return shape


def _turned(weight: Tensor, module: Rotation) -> Tensor:
    """See `formats/lora/rotation.py`."""
    blocks = tensor(module.blocks, weight)
    size = blocks.shape[-1]
    if module.axis == 1:
        columns = weight.flatten(1).unflatten(1, (-1, size))
        turned = torch.einsum("onb,nbc->onc", columns, blocks[0]).reshape(weight.shape)
    elif len(blocks) == 1:
        turned = torch.einsum("nij,nj...->ni...", blocks[0], weight.unflatten(0, (-1, size))).flatten(0, 1)
    else:
        turned = weight
        for stage, rotation in enumerate(blocks):
            apart = 2**stage * size // 2
            shuffled = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            mixed = torch.einsum("nij,nj...->ni...", rotation, shuffled).flatten(0, 1)
            turned = mixed.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    if module.rescale is not None:
        turned = turned * tensor(module.rescale, weight).view(-1, *(1,) * (weight.ndim - 1))
    return turned


def _product(like: Tensor, pair: Pair) -> Tensor:
    """(rows, columns) float32 on `like`'s device."""
    product: Tensor = tensor(pair.up, like).flatten(1) @ tensor(pair.down, like).flatten(1)
    return product


def _like(weight: Tensor, added: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Shape a change like `weight`; the channels that only an inpainting base reads get no change."""
    if len(shape) == 4 and shape[1] < weight.shape[1]:
        return pad(added.view(shape), (0, 0, 0, 0, 0, weight.shape[1] - shape[1]))
    return added.view(weight.shape)


def tensor(values: Array, like: Tensor) -> Tensor:
    """Copy to float32 on `like`'s device."""
    return as_tensor(values).to(like.device)
