"""LoRA: records of one request become one set of factor columns in the flat layout of a graph.

Several LoRAs stand side by side along the rank. α/r folds into B; the request's weights stay apart, one per
column, so that the same bound set serves every request that asks for these LoRAs at whatever weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scumble_build.layout import Layout, rank_bucket
from scumble_registry.formats.lora import LoraRecord


@dataclass(frozen=True, slots=True)
class BoundSet:
    """The factors of an ordered set of LoRAs: A (Σin, R), B (Σout, R), float32, R a rank bucket.

    `ranks[i]` columns belong to LoRA i; the columns behind the last are zero.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes


@dataclass(frozen=True, slots=True)
class RowFactors:
    """What the rows of one request carry into a graph: a bound set and its scale per column, (R,) float32."""

    bound: BoundSet
    scale: Tensor


def ranks(layout: Layout, records: Sequence[LoraRecord]) -> tuple[int, ...]:
    """How many columns each record needs in this graph: its largest rank among the graph's targets."""
    return tuple(max((record[name].rank for name in record if name in layout.targets), default=0) for record in records)


def bind(layout: Layout, records: Sequence[LoraRecord]) -> BoundSet | None:
    """Lay `records` out for one graph; None if none of them touches it.

    Raises Refused if they need more columns than the largest rank bucket.
    """
    widths = ranks(layout, records)
    if not any(widths):
        return None
    bucket = rank_bucket(sum(widths))
    A, B = torch.zeros(layout.total_in, bucket), torch.zeros(layout.total_out, bucket)
    start = 0
    for record, width in zip(records, widths, strict=True):
        for name in record:
            if (target := layout.targets.get(name)) is None:
                continue  # another graph's target
            module = record[name]
            columns = slice(start, start + module.rank)
            A[target.in_offset : target.in_offset + target.fan_in, columns] = _matrix(module.down).T
            B[target.out_offset : target.out_offset + target.fan_out, columns] = _matrix(module.up) * module.scale
        start += width
    return BoundSet(A, B, widths)


def row_factors(bound: BoundSet | None, weights: Sequence[float]) -> RowFactors | None:
    """`weights[i]` is LoRA i's strength in this graph."""
    if bound is None:
        return None
    scale = torch.zeros(bound.rank)
    start = 0
    for width, weight in zip(bound.ranks, weights, strict=True):
        scale[start : start + width] = weight
        start += width
    return RowFactors(bound, scale)


def _matrix(factor: NDArray[Any]) -> Tensor:
    """A factor of a linear layer or a 1×1 convolution as a float32 matrix."""
    return torch.from_numpy(factor.astype(np.float32).reshape(factor.shape[:2]))
