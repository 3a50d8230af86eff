"""A bound set says, in its pages, what its LoRAs say: side by side along the rank, each with its own block weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scumble.errors import Refused
from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.blocks import UNetBlocks
from scumble_build.graphs.layout import PAGE, Layout, TargetShape
from scumble_registry.formats.lora import LoraModule
from scumble_registry.formats.lora.record import Magnitude, make_module
from scumble_server.factors.binding import Piece, bind
from scumble_server.factors.bound_set import BoundSet
from scumble_server.factors.deltas import change
from scumble_server.request.block_weights import BlockWeights
from support.paging import columns

SMALL, FAR = "unet.a.to_q", "unet.conv"
LAYOUT = Layout.of([TargetShape(SMALL, 5, 7), TargetShape(FAR, 2 * 9, 6, small=False)])
SHAPES: dict[str, tuple[int, ...]] = {SMALL: (7, 5), FAR: (6, 2, 3, 3)}


def lora(name: str, rank: int, seed: int, **more: Any) -> LoraModule:
    draw = np.random.default_rng([seed, rank, len(name)])
    out, into, *kernel = SHAPES[name]
    down = draw.normal(size=(rank, into, *kernel)).astype(np.float32)
    up = draw.normal(size=(out, rank, *(1 for _ in kernel))).astype(np.float32)
    return make_module(name, down, up, 2.0, **more)


def said(bound: BoundSet, name: str, weights: list[float]) -> Tensor:
    """ΔW of a layer, as the pages say it."""
    factors = Factors(
        Pages(*bound.small.holder.tensors, torch.tensor([bound.small.pages])),
        None if bound.rest is None else Pages(*bound.rest.holder.tensors, torch.tensor([bound.rest.pages])),
        torch.zeros(1, bound.rank),
    )
    down, up = columns(factors, LAYOUT, LAYOUT.targets[name], 0)
    scale = torch.cat([torch.full((rank,), weight) for rank, weight in zip(bound.ranks, weights, strict=True)])
    count = len(scale)
    assert not down[count:].any() and not up[count:].any(), "columns behind the last are zero"
    matrix = (up[:count] * scale[:, None]).T @ down[:count]
    out, into, *kernel = SHAPES[name]
    return matrix.view(out, *kernel, into).movedim(-1, 1) if kernel else matrix


SHAPED = st.tuples(st.integers(1, 11), st.sampled_from([(SMALL,), (FAR,), (SMALL, FAR)]))
PIECES = st.lists(SHAPED, min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(shapes=PIECES)
def test_the_pages_add_up_to_every_lora_at_its_weight(shapes: list[tuple[int, tuple[str, ...]]]) -> None:
    records = [{name: lora(name, rank, seed) for name in names} for seed, (rank, names) in enumerate(shapes)]
    weights = [0.5, -1.0, 2.0][: len(records)]
    bound = bind(LAYOUT, [Piece(record) for record in records])
    assert bound is not None
    assert bound.ranks == tuple(rank for rank, _ in shapes)
    assert (bound.rest is None) == all(names == (SMALL,) for _, names in shapes)
    assert bound.rank % PAGE == 0 and 0 <= bound.rank - sum(bound.ranks) < PAGE
    for name in SHAPES if bound.rest is not None else (SMALL,):
        expected = torch.zeros(SHAPES[name])
        for record, weight in zip(records, weights, strict=True):
            if name in record:
                expected += weight * change(torch.zeros(SHAPES[name]), record[name])
        torch.testing.assert_close(said(bound, name, weights), expected, atol=1e-4, rtol=1e-4)


def test_block_weights_are_folded_in_and_targets_are_left_out() -> None:
    blocks = BlockWeights((), ((FAR, 0.25),), UNetBlocks(levels=2, layers=1))
    record = {SMALL: lora(SMALL, 2, 0), FAR: lora(FAR, 2, 0)}
    bound = bind(LAYOUT, [Piece(record, blocks)])
    assert bound is not None
    expected = 0.25 * change(torch.zeros(SHAPES[FAR]), record[FAR])
    torch.testing.assert_close(said(bound, FAR, [1.0]), expected, atol=1e-5, rtol=1e-5)
    without = bind(LAYOUT, [Piece(record)], without=frozenset((FAR,)))
    assert without is not None and without.rest is None
    assert bind(LAYOUT, [Piece(record)], without=frozenset(record)) is None
    assert bind(LAYOUT, [Piece({"unet.elsewhere": lora(SMALL, 2, 0)})]) is None


@pytest.mark.parametrize("name", [SMALL, FAR])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_dora_s_columns_and_stretch_make_its_change(name: str, axis: int) -> None:
    weight = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))
    lengths = weight.transpose(0, axis).flatten(1).norm(dim=1) * 1.3
    module = lora(name, 3, 4, magnitude=Magnitude(lengths.numpy(), axis))
    bound = bind(LAYOUT, [Piece({name: module})], lambda _: weight)
    assert bound is not None
    (stretch,) = bound.stretches
    assert stretch is not None
    assert (stretch.out is None, stretch.into is None) == (axis == 1, axis == 0)
    target = LAYOUT.targets[name]
    if axis == 0:
        vector = stretch.out[target.out_offset : target.out_end]  # type: ignore[index]
    else:
        vector = stretch.into[target.in_offset : target.in_offset + SHAPES[name][1]]  # type: ignore[index]
    shape = [1] * weight.ndim
    shape[axis] = -1
    found = said(bound, name, [1.0]) + weight * vector.view(shape)
    torch.testing.assert_close(found, change(weight, module), atol=1e-4, rtol=1e-4)


def test_more_columns_than_the_largest_bucket_are_refused() -> None:
    pieces = [Piece({SMALL: lora(SMALL, 90, seed)}) for seed in range(3)]
    with pytest.raises(Refused, match="270 rank columns"):
        bind(LAYOUT, pieces)
