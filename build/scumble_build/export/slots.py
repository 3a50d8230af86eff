"""Factors as an exported graph takes them: slots, and for each row the slot that it reads.

Every row of a batch carries factors here; for one that has none the scale is zero. That keeps the graph free of sizes
that only its callers know (`Factors` counts the rows that have any), and what it reads lies at addresses that stay: to
load an adapter is to copy it into a slot. Nothing is done in place, for a traced graph knows values, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from scumble_build.adapted import Layer, by_channel
from scumble_build.layout import Target


@dataclass(frozen=True, slots=True)
class SlotFactors:
    """A (slots, Σin, R), B (slots, Σout, R), slot (rows,) int64, scale (rows, R), stretch_out (rows, Σout) and
    stretch_in (rows, Σin) as in `Factors`; None is a graph without.
    """

    A: Tensor
    B: Tensor
    slot: Tensor
    scale: Tensor
    stretch_out: Tensor | None = None
    stretch_in: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor, base: Layer, target: Target) -> Tensor:
        """A layer's factors are sliced before slots are gathered: gathering all would copy every layer's."""
        A = self.A[:, target.in_offset : target.in_end].index_select(0, self.slot)
        B = self.B[:, target.out_offset : target.out_end].index_select(0, self.slot)
        y = self._stretched(y, x, base, target)
        if isinstance(base, nn.Conv2d):
            return y + self._of_convolution(y, x, A, B, base)
        states = x[:, None] if x.ndim == 2 else x
        added = torch.matmul(torch.matmul(states, A) * self.scale[:, None], B.transpose(1, 2))
        return y + (added[:, 0] if x.ndim == 2 else added)

    def _of_convolution(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, base: nn.Conv2d) -> Tensor:
        if base.kernel_size == (1, 1):
            hidden = torch.matmul(A.transpose(1, 2), x.flatten(2))
        else:
            hidden = _convolve(x, A, base).flatten(2)
        return torch.matmul(B, hidden * self.scale[:, :, None]).view_as(y)

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
    """x `(rows, in, H, W)`, A `(rows, k·k·in, R)` → `(rows, R, H', W')`: a convolution with kernels of each row's own.

    One product to R·k·k channels; then a fixed kernel of ones and zeros moves the k·k taps of each of R channels to
    where they belong and sums them. Exact at any stride, and few operators, which every runtime knows.
    """
    (kernel, _), rows = base.kernel_size, A.shape[0]
    taps = A.view(rows, kernel * kernel, base.in_channels, -1).permute(0, 3, 1, 2)
    product = torch.matmul(taps.reshape(rows, -1, base.in_channels), x.flatten(2))
    maps = product.view(-1, kernel * kernel, x.shape[2], x.shape[3])
    gather = torch.eye(kernel * kernel, dtype=x.dtype).view(1, kernel * kernel, kernel, kernel)
    summed = conv2d(maps, gather, stride=base.stride, padding=base.padding)
    return summed.view(rows, -1, summed.shape[2], summed.shape[3])
