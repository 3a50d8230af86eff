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
from torch.nn.functional import conv2d

from scumble_build.graphs.layout import PAGE, Layout, Target, TargetShape
from scumble_build.graphs.tensors import moved

Layer = nn.Linear | nn.Conv2d


class Carried(Protocol):
    """Factors of a call: `Factors` in torch, `PagedFactors` in an exported graph."""

    def reach(self, target: Target) -> bool:
        """Return whether there are factors for this layer."""

    def run(self, x: Tensor, base: Layer, target: Target, kernel: LinearKernel | None) -> Tensor:
        """Return base(x) plus the factors' part."""


class LinearKernel(Protocol):
    """Another way to add linear layers' factors: one kernel that reads rank pages where they are."""

    def __call__(self, x: Tensor, y: Tensor, read: PagesOfLayer) -> bool:
        """Add to the first rows of y `(rows, N, out)`, in place. False: it cannot, and y is as it was."""


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

    def run(self, x: Tensor, base: Layer, target: Target, kernel: LinearKernel | None = None) -> Tensor:
        """Return base(x) plus the factors' part."""
        read = pages_of(target, self)
        stretched = self.stretch_out is not None or self.stretch_in is not None
        unbiased = base.bias is None
        whole = x.ndim == 3 and len(x) == self.rows and not stretched
        if whole and unbiased and kernel is None and isinstance(base, nn.Linear):
            return _accumulate(x, base, read)
        y: Tensor = base(x)
        if stretched:
            _stretch(x, y, base, target, self)
        if isinstance(base, nn.Conv2d):
            _add_convolution(x, y, base, read)
            return y
        states, added = (x[:, None], y[:, None]) if x.ndim == 2 else (x, y)
        if kernel is None or not kernel(states, added, read):
            _add_linear(states, added, read)
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
    kernel: LinearKernel | None = None
    """How linear layers' factors are added; None: by batched products of gathered pages."""


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
        factors = self.source.factors
        if factors is None or not factors.reach(self.target):
            y: Tensor = self.base(x)
            return y
        return factors.run(x, self.base, self.target, self.source.kernel)


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


@dataclass(frozen=True, slots=True)
class PagesOfLayer:
    """One layer's columns, where they are in the pages, and who reads them.

    A (P, PAGE·in) and B (P, PAGE·out) are views of all pages; table (b, n) has the pages of each set, or of each row if
    rows come in no groups; scale (m, PAGE·n) is as in `Factors`. Each of the b reads for m / b neighbouring rows.
    """

    A: Tensor
    B: Tensor
    table: Tensor
    scale: Tensor

    def gather(self) -> tuple[Tensor, Tensor]:
        """Gather A `(b, R, in)` and B `(b, R, out)`."""
        batch, read = len(self.table), self.table.flatten()
        A, B = (
            pages.index_select(0, read).view(batch, self.scale.shape[1], pages.shape[1] // PAGE)
            for pages in (self.A, self.B)
        )
        return A, B


def pages_of(target: Target, factors: Factors) -> PagesOfLayer:
    """Slice one layer out of the pages. A slice copies nothing; a gather before it would copy all layers."""
    pages, in_offset, out_offset = factors.small, target.in_offset, target.out_offset
    in_small, out_small = (tensor.shape[1] // PAGE for tensor in (pages.A, pages.B))
    if in_offset >= in_small:
        assert factors.rest is not None
        pages, in_offset, out_offset = factors.rest, in_offset - in_small, out_offset - out_small
    return PagesOfLayer(
        pages.A[:, PAGE * in_offset : PAGE * (in_offset + target.fan_in)],
        pages.B[:, PAGE * out_offset : PAGE * (out_offset + target.fan_out)],
        pages.table[:: factors.rows_per_set or 1],
        factors.scale,
    )


def _accumulate(x: Tensor, base: nn.Linear, read: PagesOfLayer) -> Tensor:
    """Write the factors' part of all rows to y `(rows, N, out)` first; the base's product adds itself onto it.

    So no pass over y is made for the factors alone but the one that writes it. A bias would cost another pass.
    """
    A, B = read.gather()
    y = torch.bmm(_hidden(x, A, read.scale), B).view(len(x), -1, B.shape[-1])
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), base.weight.T)
    return y


def _add_linear(x: Tensor, y: Tensor, read: PagesOfLayer) -> None:
    """Add the factors' part to the first m rows of y `(rows, N, out)`, in place."""
    A, B = read.gather()
    rows = len(read.scale)
    y[:rows].view(len(A), -1, y.shape[-1]).baddbmm_(_hidden(x[:rows], A, read.scale), B)


def _hidden(x: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    """Return scale ⊙ (A x), `(b, N·m/b, R)`, for x `(m, N, in)`: neighbouring rows that share a set are one product."""
    hidden = torch.bmm(x.reshape(len(A), -1, x.shape[-1]), A.transpose(1, 2))
    hidden.view(len(x), -1, hidden.shape[-1]).mul_(scale[:, None])
    return hidden


def _add_convolution(x: Tensor, y: Tensor, base: nn.Conv2d, read: PagesOfLayer) -> None:
    """Do the same for x `(rows, in, H, W)` and y `(rows, out, H', W')`."""
    rows = len(read.scale)
    A, B = read.gather()
    group = rows // len(A)
    B = B.repeat_interleave(group, 0) if group > 1 else B
    if base.kernel_size == base.stride == (1, 1) and base.padding == (0, 0):
        hidden = torch.bmm(A.repeat_interleave(group, 0) if group > 1 else A, x[:rows].flatten(2))
    else:
        convolve = convolve_by_set if x.device.type == "cpu" else convolve_grouped
        hidden = convolve(x[:rows], A, base).flatten(2)
    hidden = hidden.mul_(read.scale[:, :, None])
    y[:rows].view(rows, y.shape[1], -1).baddbmm_(B.transpose(1, 2), hidden)


def convolve_by_set(x: Tensor, A: Tensor, base: nn.Conv2d) -> Tensor:
    """Convolve each row with its set's kernels: x `(m, in, H, W)`, A `(b, R, k·k·in)` → `(m, R, H', W')`.

    A convolution for each set, which a CPU runs as fast as one for all. A has the taps of an output channel in
    the order of a channels-last kernel, so nothing is copied here.
    """
    kernels = A.view(*A.shape[:2], *base.kernel_size, base.in_channels).permute(0, 1, 4, 2, 3)
    sets = x.unflatten(0, (len(A), -1))
    hidden: list[Tensor] = [
        conv2d(of_set, kernel, None, base.stride, base.padding, base.dilation)
        for of_set, kernel in zip(sets, kernels, strict=True)
    ]
    return torch.cat(hidden)


def convolve_grouped(x: Tensor, A: Tensor, base: nn.Conv2d) -> Tensor:
    """Return the same by one convolution, whose groups are the sets: a GPU runs few large kernels faster."""
    (batch, rank, _), (rows, channels, *_) = A.shape, x.shape
    kernels = A.view(-1, *base.kernel_size, channels).permute(0, 3, 1, 2).contiguous()
    sets = x.unflatten(0, (batch, -1)).transpose(0, 1).flatten(1, 2)
    hidden: Tensor = conv2d(sets, kernels, None, base.stride, base.padding, base.dilation, groups=batch)
    of_rows: Tensor = hidden.unflatten(1, (batch, rank)).transpose(0, 1)
    return of_rows.reshape(rows, rank, *hidden.shape[2:])


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
