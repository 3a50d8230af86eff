"""Factors as an exported graph takes them: pages that stay where they are, and for each row which of them it reads.

Every row of a batch carries factors here; for one that has none the scale is zero. That keeps the graph free of sizes
that only its callers know (`Factors` counts the rows that have any), and what it reads lies at addresses that stay: to
load an adapter is to copy it into pages. Nothing is done in place, for a traced graph knows values, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding

from scumble_build.graphs.adapted import Layer, Pages, by_channel
from scumble_build.graphs.layout import ALIGN, PAGE, Extent, Target

UNIT = PAGE * ALIGN
"""Numbers that are gathered at once: every layer's part of a page begins with one."""


@dataclass(frozen=True, slots=True)
class Units:
    """Pages of A or B as units (P·units of a page, UNIT), and with which unit each page that a row reads begins: starts
    (rows, n, 1).
    """

    units: Tensor
    starts: Tensor

    @classmethod
    def of(cls, pages: Tensor, table: Tensor) -> Units:
        """pages (P, PAGE·Σ), table (rows, n)."""
        return cls(pages.view(-1, UNIT), (table * (pages.shape[1] // UNIT))[:, :, None])

    def columns(self, offset: int, size: int) -> Tensor:
        """One layer's, `(rows, PAGE·n, size)`.

        Gathered out of all pages at once. A slice before the gather would be a copy of the layer's part of every page
        that is resident, in runtimes whose slices are copies.
        """
        count = -(-PAGE * size // UNIT)
        found = embedding(self.starts + (torch.arange(count) + PAGE * offset // UNIT), self.units)
        rows = self.starts.shape[0]
        if count * UNIT != PAGE * size:
            found = found.reshape(rows, -1, count * UNIT)[:, :, : PAGE * size]
        return found.reshape(rows, -1, size)


@dataclass(frozen=True, slots=True)
class LayoutPages:
    """The small layout, or what stands behind it; `before` is what stands before it."""

    A: Units
    B: Units
    before: Extent

    @classmethod
    def of(cls, pages: Pages, before: Extent) -> LayoutPages:
        return cls(Units.of(pages.A, pages.table), Units.of(pages.B, pages.table), before)

    def columns(self, target: Target) -> tuple[Tensor, Tensor]:
        """A (rows, R, in) and B (rows, R, out) of one layer."""
        return (
            self.A.columns(target.in_offset - self.before.total_in, target.fan_in),
            self.B.columns(target.out_offset - self.before.total_out, target.fan_out),
        )


@dataclass(frozen=True, slots=True)
class PagedFactors:
    """Pages for every row; scale (rows, PAGE·n); `small_extent` is where the rest begins.

    stretch_out (rows, Σout) and stretch_in (rows, Σin) as in `Factors`; None is a graph without.
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

    def add_to(self, y: Tensor, x: Tensor, base: Layer, target: Target) -> Tensor:
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
        found = y
        if self.stretch_out is not None:
            values = by_channel(self.stretch_out[:, target.out_offset : target.out_end], y, base)
            found = found + values * (y - bias)
        if self.stretch_in is not None:
            values = self.stretch_in[:, target.in_offset : target.in_offset + base.weight.shape[1]]
            found = found + base(x * by_channel(values, x, base)) - bias
        return found


def _convolve(x: Tensor, A: Tensor, base: nn.Conv2d) -> Tensor:
    """x `(rows, in, H, W)`, A `(rows, R, k·k·in)` → `(rows, R, H', W')`: a convolution with kernels of each row's own.

    One product to R·k·k channels; then a fixed kernel of ones and zeros moves the k·k taps of each of R channels to
    where they belong and sums them. Exact at any stride, and few operators, which every runtime knows.
    """
    (kernel, _), rows = base.kernel_size, A.shape[0]
    product = torch.matmul(A.reshape(rows, -1, base.in_channels), x.flatten(2))
    maps = product.view(-1, kernel * kernel, x.shape[2], x.shape[3])
    gather = torch.eye(kernel * kernel, dtype=x.dtype).view(1, kernel * kernel, kernel, kernel)
    summed = conv2d(maps, gather, stride=base.stride, padding=base.padding)
    return summed.view(rows, -1, summed.shape[2], summed.shape[3])
