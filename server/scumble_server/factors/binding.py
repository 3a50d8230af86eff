"""Lays the LoRAs of one request out for one graph: factor columns in the flat layout of its targets.

Several LoRAs stand side by side along the rank. α/r and block weights fold into B; the request's weights stay apart,
one per column, so that one bound set serves every request that asks for these LoRAs, at whatever weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.arrays import as_tensor
from scumble_build.graphs.layout import PAGE, Extent, Layout, Target, pages_for, rank_bucket
from scumble_registry.formats.lora import LoraModule, Module
from scumble_registry.formats.lora.record import Gain
from scumble_server.factors.bound_set import BoundSet, Stretch
from scumble_server.factors.deltas import gains, tensor
from scumble_server.memory.pages import PageSet
from scumble_server.request.block_weights import BlockWeights


@dataclass(frozen=True, slots=True)
class Piece:
    """One LoRA of a set, with its block weights."""

    record: Mapping[str, Module]
    blocks: BlockWeights | None = None

    def block(self, target: str) -> float:
        return 1.0 if self.blocks is None else self.blocks.of(target)


def bind(
    layout: Layout,
    pieces: Sequence[Piece],
    weight_of: Callable[[str], Tensor] | None = None,
    without: frozenset[str] = frozenset(),
) -> BoundSet | None:
    """Lay a set out for one graph, in pages of its own, float32 in host memory; all but the targets `without`. None if
    none of it touches the graph. `weight_of` a target, where something depends on it.

    Raises Refused if the set needs more columns than the largest rank bucket.
    """
    own = [
        {name: m for name, m in piece.record.items() if name in layout.targets and name not in without}
        for piece in pieces
    ]
    if not any(own):
        return None
    widths = tuple(max((module.columns or 0 for module in modules.values()), default=0) for modules in own)
    rank_bucket(sum(widths))  # refused here, not in the batch that it would join
    extent = layout.extent(name for modules in own for name in modules)
    count = max(pages_for(sum(widths)), 1)
    A, B = torch.zeros(count, PAGE * extent.total_in), torch.zeros(count, PAGE * extent.total_out)
    start = 0
    stretches, layers = [], []
    for piece, modules, width in zip(pieces, own, widths, strict=True):
        stretch, changed = _Stretching(extent), set[str]()
        for name, module in modules.items():
            target, block = layout.targets[name], piece.block(name)
            if isinstance(module, Gain):
                stretch.add(target, module.axis, tensor(module.values, A) * block)
                changed.add(name)
                continue
            assert isinstance(module, LoraModule)
            down, up = _columns(module, target, weight_of)
            if module.magnitude is not None:
                assert weight_of is not None
                gain = gains(weight_of(name), module).cpu()
                stretch.add(target, module.magnitude.axis, (gain - 1) * block)
                down, up = _stretched(down, up, gain, module.magnitude.axis)
            _place(A, target.in_offset, start, down)
            _place(B, target.out_offset, start, up.T * block)
            if block and (module.magnitude is not None or (down.any() and up.any())):
                changed.add(name)
        start += width
        stretches.append(stretch.done())
        layers.append(frozenset(changed))
    small_in, small_out = PAGE * layout.small.total_in, PAGE * layout.small.total_out
    rest = None if extent == layout.small else PageSet.own(A[:, small_in:], B[:, small_out:])
    return BoundSet(PageSet.own(A[:, :small_in], B[:, :small_out]), rest, widths, tuple(stretches), tuple(layers))


def _place(pages: Tensor, offset: int, start: int, columns: Tensor) -> None:
    """columns (r, size) of one layer into `(n, PAGE·Σ)`, from column `start` on."""
    count, size = columns.shape
    block = pages[:, PAGE * offset : PAGE * (offset + size)].unflatten(1, (PAGE, size))
    places = torch.arange(start, start + count)
    block[places // PAGE, places % PAGE] = columns


def _columns(module: LoraModule, target: Target, weight_of: Callable[[str], Tensor] | None) -> tuple[Tensor, Tensor]:
    """down (columns, k·k·in), tap by tap, and up (out, columns), α/r folded in; a GLoRA's W a₁ a₂ beside its own."""
    down, up = _rows(module.down), _rows(module.up) * module.scale
    if module.inner is not None:
        assert weight_of is not None
        mixed = weight_of(target.name).float().cpu().flatten(1) @ _rows(module.inner.up)
        down = torch.cat([_rows(module.inner.down), down])
        up = torch.cat([mixed * module.scale, up], dim=1)
    if down.shape[1] < target.fan_in:  # the first convolution of a base that reads more channels (inpainting)
        taps = module.down.shape[2] * module.down.shape[3]
        down = pad(down.unflatten(1, (taps, -1)), (0, (target.fan_in - down.shape[1]) // taps)).flatten(1)
    return down, up


class _Stretching:
    """A stretch on its way: vectors are made when the first layer needs them."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self._out: Tensor | None = None
        self._into: Tensor | None = None

    def add(self, target: Target, axis: int, values: Tensor) -> None:
        if axis == 0:
            self._out = torch.zeros(self._extent.total_out) if self._out is None else self._out
            self._out[target.out_offset : target.out_end] = values
        else:
            self._into = torch.zeros(self._extent.total_in) if self._into is None else self._into
            self._into[target.in_offset : target.in_offset + len(values)] = values

    def done(self) -> Stretch | None:
        return None if self._out is None and self._into is None else Stretch(self._out, self._into)


def _stretched(down: Tensor, up: Tensor, gain: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """down (r, k·k·in), tap by tap, or up (out, r), times the gain of its axis."""
    if axis == 0:
        return down, up * gain[:, None]
    return down * gain.repeat(down.shape[1] // len(gain)), up


def _rows(factor: NDArray[Any]) -> Tensor:
    """A factor as a float32 matrix: (r, in) or (out, r); of a convolution (r, k·k·in), tap by tap."""
    matrix = as_tensor(factor)
    if matrix.ndim == 4:
        matrix = matrix.permute(0, 2, 3, 1)
    return matrix.reshape(len(matrix), -1)
