"""Factors as an exported graph takes them: pages at fixed addresses, and for each row the pages that it reads.

Every row of a batch has factors here; a row without adapters has a scale of zero. So the graph does not depend on the
number of rows with factors (`Factors` does), and loading an adapter only copies it into pages. Nothing is done in
place, since a traced graph has values, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding

from scumble_build.graphs.adapted import Layer, LinearKernel, Pages, by_channel
from scumble_build.graphs.layout import ALIGN, PAGE, Extent, Target

UNIT = PAGE * ALIGN
"""Numbers in a unit of the gather; every layer's part of a page begins at a multiple of it."""


@dataclass(frozen=True, slots=True)
class Units:
    """Pages of A or B as units (P · units per page, UNIT), and the first unit of each page that a row reads: starts
    (rows, n, 1).
    """

    units: Tensor
    starts: Tensor

    @classmethod
    def of(cls, pages: Tensor, table: Tensor) -> Units:
        """Split pages (P, PAGE·Σ) into units; table (rows, n) has the pages that each row reads."""
        return cls(pages.view(-1, UNIT), (table * (pages.shape[1] // UNIT))[:, :, None])

    def columns(self, offset: int, size: int) -> Tensor:
        """Gather one layer's columns, `(rows, PAGE·n, size)`.

        They are gathered from all pages at once: a slice before the gather would copy the layer's part of every
        resident page, in runtimes whose slices are copies.
        """
        count = -(-PAGE * size // UNIT)
        columns = embedding(self.starts + (torch.arange(count) + PAGE * offset // UNIT), self.units)
        rows = self.starts.shape[0]
        if count * UNIT != PAGE * size:
            columns = columns.reshape(rows, -1, count * UNIT)[:, :, : PAGE * size]
        return columns.reshape(rows, -1, size)


@dataclass(frozen=True, slots=True)
class LayoutPages:
    """Pages of the small layout or of the rest; `before` is the extent of the layout before it."""

    A: Units
    B: Units
    before: Extent

    @classmethod
    def of(cls, pages: Pages, before: Extent) -> LayoutPages:
        return cls(Units.of(pages.A, pages.table), Units.of(pages.B, pages.table), before)

    def columns(self, target: Target) -> tuple[Tensor, Tensor]:
        """Gather A (rows, R, in) and B (rows, R, out) of one layer."""
        return (
            self.A.columns(target.in_offset - self.before.total_in, target.fan_in),
            self.B.columns(target.out_offset - self.before.total_out, target.fan_out),
        )


@dataclass(frozen=True, slots=True)
class PagedFactors:
    """Pages of every row; scale (rows, PAGE·n); the rest begins at `small_extent`.

    stretch_out (rows, Σout) and stretch_in (rows, Σin) as in `Factors`; None in a graph without.
    """

    small: LayoutPages
    rest: LayoutPages | None
    small_extent: Extent
    scale: Tensor
    stretch_out: Tensor | None = None
    stretch_in: Tensor | None = None

    def reach(self, target: Target) -> bool:
        return self._part(target) is not None

    def _part(self, target: Target) -> LayoutPages | None:
        return self.small if target.in_offset < self.small_extent.total_in else self.rest

    def run(self, x: Tensor, base: Layer, target: Target, kernel: LinearKernel | None = None) -> Tensor:  # noqa: ARG002 - for eager graphs
        y: Tensor = base(x)
        part = self._part(target)
        assert part is not None
        A, B = part.columns(target)
        y = self._stretched(y, x, base, target)
        if isinstance(base, nn.Conv2d):
            hidden = torch.matmul(A, x.flatten(2)) if base.kernel_size == (1, 1) else _convolve(x, A, base).flatten(2)
            return y + torch.matmul(B.transpose(1, 2), hidden * self.scale[:, :, None]).view_as(y)
        states = x[:, None] if x.ndim == 2 else x
        added = torch.matmul(torch.matmul(states, A.transpose(1, 2)) * self.scale[:, None], B)
        return y + (added[:, 0] if x.ndim == 2 else added)

    def _stretched(self, y: Tensor, x: Tensor, base: Layer, target: Target) -> Tensor:
        bias = 0 if base.bias is None else by_channel(base.bias[None], y, base)
        stretched = y
        if self.stretch_out is not None:
            values = by_channel(self.stretch_out[:, target.out_offset : target.out_end], y, base)
            stretched = stretched + values * (y - bias)
        if self.stretch_in is not None:
            values = self.stretch_in[:, target.in_offset : target.in_offset + base.weight.shape[1]]
            stretched = stretched + base(x * by_channel(values, x, base)) - bias
        return stretched


def _convolve(x: Tensor, A: Tensor, base: nn.Conv2d) -> Tensor:
    """Convolve each row with its own kernels: x `(rows, in, H, W)`, A `(rows, R, k·k·in)` → `(rows, R, H', W')`.

    One product to R·k·k channels; then a fixed kernel of ones and zeros shifts the k·k taps of each of the R channels
    and sums them. Exact at any stride, with few operators, which every runtime has.
    """
    (kernel, _), rows = base.kernel_size, A.shape[0]
    product = torch.matmul(A.reshape(rows, -1, base.in_channels), x.flatten(2))
    maps = product.view(-1, kernel * kernel, x.shape[2], x.shape[3])
    gather = torch.eye(kernel * kernel, dtype=x.dtype).view(1, kernel * kernel, kernel, kernel)
    summed = conv2d(maps, gather, stride=base.stride, padding=base.padding)
    return summed.view(rows, -1, summed.shape[2], summed.shape[3])
