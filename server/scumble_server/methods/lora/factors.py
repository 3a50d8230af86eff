"""LoRA: records of one request become one set of factor columns in the flat layout of a graph.

Several LoRAs stand side by side along the rank. α/r folds into B; the request's weights stay apart, one per
column, so that the same bound set serves every request that asks for these LoRAs at whatever weights. What no factors
say (`LoraCompatibility.merged`) is merged into weights (`variants.py`), and with it all that others change there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from scumble.errors import Refused
from scumble_build.graphs.layout import PAGE, Extent, Layout, Target, pages_for, rank_bucket
from scumble_registry.compatibility import IpAdapterCompatibility, LoraCompatibility
from scumble_registry.formats import ip_adapter
from scumble_registry.formats.lora import KIND, LoraModule, Module, read_record
from scumble_registry.formats.lora.record import Gain
from scumble_server.base import Base
from scumble_server.denoise.phase import BoundSet, RowFactors, Stretch
from scumble_server.memory.pages import PageSet
from scumble_server.methods.context import Context
from scumble_server.methods.hypernetwork import predictor as predicted
from scumble_server.methods.lora.deltas import gains, tensor
from scumble_server.request.adapter import Bound
from scumble_server.request.block_weights import BlockWeights
from scumble_server.request.settings import Settings

FIELDS = frozenset({"text_weight", "blocks", "start", "end"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One LoRA of a set, with its block weights."""

    record: Mapping[str, Module]
    blocks: BlockWeights | None = None

    def block(self, target: str) -> float:
        return 1.0 if self.blocks is None else self.blocks.of(target)


def part_of(bound: Bound) -> LoraCompatibility | None:
    """What of an adapter is a LoRA: all of one, a FaceID's own, what a hypernetwork predicts, nothing of others."""
    compatibility = bound.version.manifest.compatibility
    if isinstance(compatibility, IpAdapterCompatibility):
        return compatibility.lora
    if (predictor := predicted.predictor_of(bound)) is not None:
        return predictor.lora
    return compatibility if isinstance(compatibility, LoraCompatibility) else None


def record_of(context: Context, bound: Bound) -> Mapping[str, Module]:
    """The LoRA in an adapter that has one (`part_of`)."""
    if bound.kind == KIND:
        return context.record(bound, read_record)
    if predicted.predictor_of(bound) is not None:
        return predicted.record(context, bound)
    return context.record(bound, ip_adapter.read_record).lora


def identity(context: Context, bound: Bound) -> Hashable:
    """All that the factors of an adapter are made of, its strengths and the base's weights aside."""
    return bound.version.digest, predicted.condition_key(context, bound), bound.blocks


def check(bound: Bound, base: Base) -> None:
    """Every target that rows carry factors for must stand in one of the graphs."""
    for target in _compatibility(bound).ranks:
        if not any(target in layout.targets for layout in base.layouts):
            raise Refused(
                f"{bound.version.ref} changes {target}, which this server cannot adapt",
                ref=bound.spec.ref,
                target=target,
            )


def check_together(adapters: Sequence[Bound], base: Base, settings: Settings) -> None:
    """Any number may act at once: more columns than the largest bucket holds are merged (`variants.py`)."""


def idle(bound: Bound, steps: int) -> str | None:
    has_text = any(name.startswith("text_encoder") for name in targets_of(bound))
    if bound.text_weight and has_text:
        return None
    return bound.why_never(steps)


def describe(bound: Bound) -> dict[str, Any]:
    about = _compatibility(bound)
    merged = {"merged": len(about.merged)} if about.merged else {}
    return {"rank": max(about.ranks.values(), default=0), **merged}


def bound_bytes(layout: Layout, adapters: Sequence[Bound], itemsize: int, without: frozenset[str] = frozenset()) -> int:
    """How large the bound set of these will be in this graph, before any of it is read."""
    names = {name for bound in adapters for name in _compatibility(bound).ranks if name in layout.targets} - without
    if not names:
        return 0
    needed = columns(layout, adapters, without)
    extent = layout.extent(names)
    stretches = 4 * sum(depends_on_weights(bound) for bound in adapters)
    return (extent.total_in + extent.total_out) * (PAGE * max(pages_for(needed), 1) * itemsize + stretches)


def columns(layout: Layout, adapters: Sequence[Bound], without: frozenset[str] = frozenset()) -> int:
    """How many rank columns these need together in this graph, for all targets but those `without`."""
    return sum(rank_in(layout, _compatibility(bound).ranks, without) for bound in adapters)


def targets_of(bound: Bound) -> Iterable[str]:
    """The layers and norms that it changes, by canonical name."""
    return _compatibility(bound).requires


def merged_of(adapters: Iterable[Bound]) -> frozenset[str]:
    """Targets that one of these changes in a way that no factors say."""
    return frozenset(target for bound in adapters for target in _compatibility(bound).merged)


def depends_on_weights(bound: Bound) -> bool:
    """A DoRA is bound to the weights that it was measured against."""
    part = part_of(bound)
    return part is not None and part.magnitudes


def rank_in(layout: Layout, ranks: Mapping[str, int], without: frozenset[str] = frozenset()) -> int:
    """How many columns a LoRA with these ranks needs in this graph: the largest among the graph's targets."""
    return max((rank for name, rank in ranks.items() if name in layout.targets and name not in without), default=0)


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
    stretches = []
    for piece, modules, width in zip(pieces, own, widths, strict=True):
        stretch = _Stretching(extent)
        for name, module in modules.items():
            target, block = layout.targets[name], piece.block(name)
            if isinstance(module, Gain):
                stretch.add(target, module.axis, tensor(module.values, A) * block)
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
        start += width
        stretches.append(stretch.done())
    small_in, small_out = PAGE * layout.small.total_in, PAGE * layout.small.total_out
    rest = None if extent == layout.small else PageSet.own(A[:, small_in:], B[:, small_out:])
    return BoundSet(PageSet.own(A[:, :small_in], B[:, :small_out]), rest, widths, tuple(stretches))


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


def row_factors(bound: BoundSet | None, weights: Sequence[float]) -> RowFactors | None:
    """`weights[i]` is LoRA i's strength in this graph. None if nothing is left of the set."""
    if bound is None or not any(weights):
        return None
    scale = torch.zeros(bound.rank)
    start = 0
    for width, weight in zip(bound.ranks, weights, strict=True):
        scale[start : start + width] = weight
        start += width
    return RowFactors(bound, scale, _sum(bound.stretches, weights))


def _sum(stretches: Sequence[Stretch | None], weights: Sequence[float]) -> Stretch | None:
    present = [(each, weight) for each, weight in zip(stretches, weights, strict=True) if each is not None and weight]
    if not present:
        return None

    def total(vectors: Iterable[tuple[Tensor | None, float]]) -> Tensor | None:
        parts = [vector * weight for vector, weight in vectors if vector is not None]
        return torch.stack(parts).sum(0) if parts else None

    return Stretch(
        total((each.out, weight) for each, weight in present), total((each.into, weight) for each, weight in present)
    )


def _rows(factor: NDArray[Any]) -> Tensor:
    """A factor as a float32 matrix: (r, in) or (out, r); of a convolution (r, k·k·in), tap by tap."""
    matrix = factor.astype(np.float32)
    if matrix.ndim == 4:
        matrix = matrix.transpose(0, 2, 3, 1)
    return torch.from_numpy(np.ascontiguousarray(matrix.reshape(len(matrix), -1)))


def _compatibility(bound: Bound) -> LoraCompatibility:
    part = part_of(bound)
    assert part is not None
    return part


__all__ = [
    "FIELDS",
    "KIND",
    "Piece",
    "bind",
    "bound_bytes",
    "check",
    "check_together",
    "columns",
    "depends_on_weights",
    "describe",
    "identity",
    "idle",
    "merged_of",
    "part_of",
    "rank_in",
    "read_record",
    "record_of",
    "row_factors",
    "targets_of",
]
