"""Layers that take low-rank factors as an input. The base's weights are only read, never changed.

For row i with the columns A and B of its pages:   y[i] = W x[i] + bias + Bᵀ (scale[i] ⊙ (A x[i]))

(Hu et al., LoRA, 2106.09685, with α/r folded into B and the request's weights in `scale`.) For a k×k convolution
A x is a convolution to R channels with the base's stride and padding, and Bᵀ a 1×1 convolution (LoCon).

A DoRA (Liu et al., 2402.09353) also multiplies W's rows by 1 + o, or its columns by 1 + i:

    y[i] += o ⊙ (W x[i]) + W (i ⊙ x[i])

Its factors already include that gain. Several adapters add up, each relative to the base, so order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from scumble_build.graphs.layout import PAGE, Layout, Target, TargetShape
from scumble_build.graphs.tensors import moved

Layer = nn.Linear | nn.Conv2d


class Carried(Protocol):
    """Factors of a call: `Factors` in torch, `PagedFactors` in an exported graph."""

    def reach(self, target: Target) -> bool:
        """Return whether there are factors for this layer."""

    def add_to(self, y: Tensor, x: Tensor, base: Layer, target: Target) -> Tensor:
        """Return y = base(x) plus the factors' part. y may be overwritten."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Rank pages of one part of a layout, and the n pages that each row reads, in the order of its rank columns.

    A (P, PAGE·Σin), B (P, PAGE·Σout) as in `layout.py`; table (m, n) int64.
    """

    A: Tensor
    B: Tensor
    table: Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of the first `m` rows of a batch. Rows from `m` on have none and cost nothing.

    `small` holds the small layout's pages, `rest` those of all other layers, or None if no row has any. scale
    (m, PAGE·n) is the weight of each rank column, 0 for an inactive one. `rows_per_set` is g if the rows come in groups
    of g neighbours that share a set of pages, else 0: then pages are gathered row by row. stretch_out (m, Σout) and
    stretch_in (m, Σin), over the full or the small layout, are DoRA's o and i, 0 for rows without; None costs nothing.
    An input channel of a convolution has k·k entries in Σin, of which the first is read.
    """

    small: Pages
    rest: Pages | None
    scale: Tensor
    rows_per_set: int = 0
    stretch_out: Tensor | None = None
    stretch_in: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return the same factors on `device` in `dtype`. Tensors that are already there are not copied."""
        return moved(self, device, dtype)

    def reach(self, target: Target) -> bool:
        return self.rest is not None or PAGE * target.in_end <= self.small.A.shape[1]

    def add_to(self, y: Tensor, x: Tensor, base: Layer, target: Target) -> Tensor:
        """Add the factors' part to y in place and return y."""
        if self.stretch_out is not None or self.stretch_in is not None:
            _stretch(x, y, base, target, self)
        if isinstance(base, nn.Conv2d):
            _add_convolution(x, y, base, target, self)
        elif x.ndim == 2:
            _add_linear(x[:, None], y[:, None], target, self)
        else:
            _add_linear(x, y, target, self)
        return y

    @property
    def rows(self) -> int:
        """The number m of rows with factors."""
        return self.scale.shape[0]


class Change(Protocol):
    def change(self, target: str, x: Tensor) -> Tensor:
        """Return what the layer `target` reads instead of x; same shape as x."""


@dataclass(slots=True)
class FactorInput:
    """The one place from which all layers of a graph read this call's factors. Owned by one thread at a time."""

    factors: Carried | None = None
    changes: tuple[Change, ...] = ()
    """Applied to each layer's input, first of all."""


class Adapted(nn.Module):
    """A linear layer or a convolution with factors as an input."""

    def __init__(self, base: Layer, target: Target, source: FactorInput) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on x: `(rows, in)` or `(rows, N, in)` if linear, `(rows, in, H, W)` for a convolution."""
        for change in self.source.changes:
            x = change.change(self.target.name, x)
        y: Tensor = self.base(x)
        factors = self.source.factors
        if factors is None or not factors.reach(self.target):
            return y
        return factors.add_to(y, x, self.base, self.target)


def _stretch(x: Tensor, y: Tensor, base: Layer, target: Target, factors: Factors) -> None:
    """Add DoRA's part to y = Wx + bias in place. Channels are dim 1 in a convolution, the last dim in a
    linear layer.
    """
    rows = factors.rows
    bias = 0 if base.bias is None else by_channel(base.bias[None], y, base)
    if factors.stretch_out is not None:
        values = by_channel(factors.stretch_out[:, target.out_offset : target.out_end], y, base)
        y[:rows].mul_(1 + values).sub_(values * bias)
    if factors.stretch_in is not None:
        values = factors.stretch_in[:, target.in_offset : target.in_offset + base.weight.shape[1]]
        y[:rows] += base(x[:rows] * by_channel(values, x, base)) - bias


def by_channel(values: Tensor, like: Tensor, base: Layer) -> Tensor:
    """Reshape values `(rows, channels)` to broadcast over `like`, an input or output of `base`."""
    rest = [None] * (like.ndim - 2)
    return values[:, :, *rest] if isinstance(base, nn.Conv2d) else values[:, *rest, :]


def _add_linear(x: Tensor, y: Tensor, target: Target, factors: Factors) -> None:
    """Add the factors' part to the first m rows of y `(rows, N, out)`, in place."""
    rows = factors.rows
    A, B = _gather(target, factors)
    # Neighbouring rows that share a set are one product.
    batch = A.shape[0]
    hidden = torch.bmm(x[:rows].reshape(batch, -1, x.shape[-1]), A.transpose(1, 2))
    hidden.view(rows, -1, hidden.shape[-1]).mul_(factors.scale[:, None])
    y[:rows].view(batch, -1, y.shape[-1]).baddbmm_(hidden, B)


def _add_convolution(x: Tensor, y: Tensor, base: nn.Conv2d, target: Target, factors: Factors) -> None:
    """Do the same for x `(rows, in, H, W)` and y `(rows, out, H', W')`."""
    rows = factors.rows
    A, B = _gather(target, factors)
    group = rows // A.shape[0]
    if group > 1:
        A, B = A.repeat_interleave(group, 0), B.repeat_interleave(group, 0)
    x = x[:rows]
    hidden = torch.bmm(A, x.flatten(2)) if base.kernel_size == (1, 1) else _convolve(x, A, base, y.shape[2:]).flatten(2)
    hidden = hidden.mul_(factors.scale[:, :, None])
    y[:rows].view(rows, y.shape[1], -1).baddbmm_(B.transpose(1, 2), hidden)


def _convolve(x: Tensor, A: Tensor, base: nn.Conv2d, size: torch.Size) -> Tensor:
    """Convolve each row with its own kernels: x `(m, in, H, W)`, A `(m, R, k·k·in)` → `(m, R, H', W')`.

    One product to k·k·R channels, then the sum of k·k shifted, strided slices: exact at any stride, and only
    operators that every executor supports.
    """
    (kernel, _), (stride, _), padding = base.kernel_size, base.stride, base.padding[0]
    assert not isinstance(padding, str)
    rows, channels, height, width = x.shape
    rank = A.shape[1]
    taps = A.view(rows, rank, kernel * kernel, channels).transpose(1, 2).reshape(rows, -1, channels)
    product = torch.bmm(taps, x.flatten(2)).view(rows, kernel, kernel, rank, height, width)
    product = pad(product, (padding, padding, padding, padding))
    reach = [stride * (side - 1) + 1 for side in size]
    shifted = [
        product[:, i, j, :, i : i + reach[0] : stride, j : j + reach[1] : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    total = shifted[0].clone()
    for part in shifted[1:]:
        total += part
    return total


def _gather(target: Target, factors: Factors) -> tuple[Tensor, Tensor]:
    """Gather one layer's A `(b, R, in)` and B `(b, R, out)`; b counts sets if `rows_per_set`, else rows.

    The slice comes before the gather because a slice copies nothing; gathering first would copy every layer's factors
    for every row.
    """
    pages, in_offset, out_offset = factors.small, target.in_offset, target.out_offset
    in_small, out_small = (tensor.shape[1] // PAGE for tensor in (pages.A, pages.B))
    if in_offset >= in_small:
        assert factors.rest is not None
        pages, in_offset, out_offset = factors.rest, in_offset - in_small, out_offset - out_small
    table = pages.table[:: factors.rows_per_set or 1]
    batch, read = table.shape[0], table.flatten()
    A = pages.A[:, PAGE * in_offset : PAGE * (in_offset + target.fan_in)].index_select(0, read)
    B = pages.B[:, PAGE * out_offset : PAGE * (out_offset + target.fan_out)].index_select(0, read)
    return A.view(batch, -1, target.fan_in), B.view(batch, -1, target.fan_out)


def find_layers(module: nn.Module, prefix: str) -> dict[str, Layer]:
    """Return every linear layer and convolution below `module` by `prefix + dotted name`."""
    return {prefix + name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}


def adapt(root: nn.Module, layers: dict[str, Layer], prefix: str) -> tuple[Layout, FactorInput]:
    """Replace each of `layers` below `root` with an Adapted around it. The layers are shared, not copied."""
    layout, source = layout_of(layers), FactorInput()
    for name, layer in layers.items():
        parent, _, child = name.removeprefix(prefix).rpartition(".")
        setattr(root.get_submodule(parent), child, Adapted(layer, layout.targets[name], source))
    return layout, source


def layout_of(layers: dict[str, Layer]) -> Layout:
    """Build the layout of these layers. The small layout holds those inside attention blocks and text encoders."""
    return Layout.of(
        TargetShape(name, layer.weight[0].numel(), layer.weight.shape[0], _is_small(name))
        for name, layer in layers.items()
    )


def _is_small(name: str) -> bool:
    return ".attentions." in name or not name.startswith("unet.")
