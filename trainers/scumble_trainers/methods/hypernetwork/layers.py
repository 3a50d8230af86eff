"""Applies a different LoRA to every row of a batch, on a frozen UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scumble_build.graphs.predictor import Predictor

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PREFIX = "unet."

RowFactors = Mapping[str, tuple[Tensor, Tensor]]
"""Target → down (B, r, in) and up (B, out, r)."""


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers of all attentions by target name, in order."""
    return {
        f"{PREFIX}{name}": module
        for name, module in sorted(unet.named_modules())
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{end}" for end in ATTENTION))
    }


def expand_rows(predictor: Predictor, coefficients: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Expand the coefficients of all rows, `(B, T, r (a + b))`, as `Predictor.expand` does. Differentiable."""
    rank, a, b = predictor.config.rank, predictor.config.a, predictor.config.b
    ups = coefficients[..., : a * rank].unflatten(-1, (a, rank))
    downs = coefficients[..., a * rank :].unflatten(-1, (rank, b))
    return {
        target: (
            downs[:, index] @ predictor.get_buffer(f"down_{index}"),
            predictor.get_buffer(f"up_{index}") @ ups[:, index],
        )
        for index, target in enumerate(predictor.config.targets)
    }


class RowLora:
    """Adds scale · (x downᵀ) upᵀ to each layer's output, with the factors of x's row.

    Owns hooks on `layers`. `factors` are kept until they are set again, so that a backward pass with gradient
    checkpointing uses those of its forward pass; None adds nothing.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], scale: float) -> None:
        self.scale = scale
        self.factors: RowFactors | None = None
        for target, layer in layers.items():
            layer.register_forward_hook(partial(self._add, target))

    def _add(self, target: str, _layer: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor | None:
        if self.factors is None:
            return None
        down, up = (factor.to(output.dtype) for factor in self.factors[target])
        narrow = torch.bmm(inputs[0], down.transpose(1, 2))
        return torch.baddbmm(output, narrow, up.transpose(1, 2), alpha=self.scale)
