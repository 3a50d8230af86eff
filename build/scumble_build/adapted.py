"""Layers that take low-rank factors as an input. The base's weights stay where they are and are only read.

For row i with slot s = slot[i]:   y[i] = W x[i] + bias + B[s] (scale[i] ⊙ (A[s]ᵀ x[i]))

(Hu et al., LoRA, 2106.09685, with α/r folded into B and the request's weights in `scale`.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scumble_build.layout import Layout, Target


@dataclass(frozen=True, slots=True)
class Factors:
    """What the first `m` rows of a batch carry; rows from `m` on carry nothing and cost nothing.

    A (slots, Σin, R), B (slots, Σout, R), slot (m,) int64, scale (m, R).
    `rows_per_slot` is g where slot is 0…0 1…1 2…2 with g rows each, else 0: then slots are gathered row by row.
    """

    A: Tensor
    B: Tensor
    slot: Tensor
    scale: Tensor
    rows_per_slot: int = 0


@dataclass(slots=True)
class FactorInput:
    """The one place from which all layers of a graph read this call's factors. Owned by one thread at a time."""

    factors: Factors | None = None


class AdaptedLinear(nn.Module):
    """A linear layer or a 1×1 convolution with factors as an input."""

    def __init__(self, base: nn.Linear | nn.Conv2d, target: Target, source: FactorInput) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """x `(rows, N, in)` for a linear layer, `(rows, in, H, W)` for a convolution."""
        y: Tensor = self.base(x)
        factors = self.source.factors
        if factors is not None:
            if x.ndim == 3:
                _add(x, y, self.target, factors)
            else:
                _add_channels_first(x, y, self.target, factors)
        return y


def _add(x: Tensor, y: Tensor, target: Target, factors: Factors) -> None:
    """Add the factors' part to the rows of y `(rows, N, out)` that carry any."""
    rows = factors.slot.shape[0]
    A, B = _slice(target, factors)
    # Rows of one slot lie side by side: together they are one product, and nothing is copied.
    batch = A.shape[0]
    hidden = torch.bmm(x[:rows].reshape(batch, -1, x.shape[-1]), A)
    hidden.view(rows, -1, hidden.shape[-1]).mul_(factors.scale[:, None])
    y[:rows].view(batch, -1, y.shape[-1]).baddbmm_(hidden, B.transpose(1, 2))


def _add_channels_first(x: Tensor, y: Tensor, target: Target, factors: Factors) -> None:
    """The same for x `(rows, in, H, W)` and y `(rows, out, H, W)`."""
    rows = factors.slot.shape[0]
    A, B = _slice(target, factors)
    group = rows // A.shape[0]
    if group > 1:
        A, B = A.repeat_interleave(group, 0), B.repeat_interleave(group, 0)
    hidden = torch.bmm(A.transpose(1, 2), x[:rows].flatten(2)).mul_(factors.scale[:, :, None])
    y[:rows].view(rows, y.shape[1], -1).baddbmm_(B, hidden)


def _slice(target: Target, factors: Factors) -> tuple[Tensor, Tensor]:
    """This layer's A `(b, in, R)` and B `(b, out, R)`: one for each slot where rows lie slot by slot, else for each row.

    Sliced before the gather: gathering first would copy every layer's factors for every row.
    """
    A = factors.A[:, target.in_offset : target.in_offset + target.fan_in]
    B = factors.B[:, target.out_offset : target.out_offset + target.fan_out]
    if factors.rows_per_slot:
        return A, B
    return A.index_select(0, factors.slot), B.index_select(0, factors.slot)


def find_targets(module: nn.Module, prefix: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer and 1×1 convolution below `module`, as `prefix + dotted name` → layer."""
    return {
        prefix + name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    }


def layout_of(targets: dict[str, nn.Linear | nn.Conv2d]) -> Layout:
    return Layout.of((name, layer.weight.shape[1], layer.weight.shape[0]) for name, layer in targets.items())


def adapt(root: nn.Module, targets: dict[str, nn.Linear | nn.Conv2d], prefix: str) -> tuple[Layout, FactorInput]:
    """Put an AdaptedLinear in front of each target below `root`; the layers themselves are shared, not copied."""
    layout, source = layout_of(targets), FactorInput()
    for name, layer in targets.items():
        parent, _, child = name.removeprefix(prefix).rpartition(".")
        setattr(root.get_submodule(parent), child, AdaptedLinear(layer, layout.targets[name], source))
    return layout, source
