"""What rows carry of LoRAs: a scale for each column, stretches that add up, and tables of pages in a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scumble_build.graphs.layout import PAGE, Extent
from scumble_server.factors.bound_set import BoundSet, Stretch, move_to_pools
from scumble_server.factors.rows import RowFactors, stack_factors
from scumble_server.memory.pages import PageSet, Pool
from scumble_server.methods.part import BatchRows

SMALL, REST = Extent(4, 3), Extent(6, 2)


@pytest.fixture
def pools() -> list[Pool]:
    return [Pool(extent, torch.device("cpu"), torch.float32) for extent in (SMALL, REST)]


def bound(*ranks: int, full: bool = False, stretches: tuple[Stretch | None, ...] = ()) -> BoundSet:
    count = -(-sum(ranks) // PAGE)

    def pages(extent: Extent) -> PageSet:
        return PageSet.own(torch.randn(count, PAGE * extent.total_in), torch.randn(count, PAGE * extent.total_out))

    return BoundSet(pages(SMALL), pages(REST) if full else None, ranks, stretches or (None,) * len(ranks))


def carried(pools: list[Pool], *ranks: int, full: bool = False) -> RowFactors:
    made = RowFactors.of(move_to_pools(bound(*ranks, full=full), pools), [1.0] * len(ranks))
    assert made is not None
    return made


def test_each_column_has_the_weight_of_its_lora_and_those_behind_none() -> None:
    made = RowFactors.of(bound(3, 2), [0.5, -1.0])
    assert made is not None
    assert made.scale.tolist() == [0.5] * 3 + [-1.0] * 2 + [0.0] * 3
    assert made.includes == {"factors"}


def test_nothing_is_carried_where_nothing_acts() -> None:
    assert RowFactors.of(None, [1.0]) is None
    assert RowFactors.of(bound(3, 2), [0.0, 0.0]) is None


def test_stretches_add_up_at_their_weights() -> None:
    out = [torch.randn(SMALL.total_out) for _ in range(2)]
    into = torch.randn(SMALL.total_in)
    made = RowFactors.of(
        bound(1, 1, 1, stretches=(Stretch(out[0], None), None, Stretch(out[1], into))), [0.5, 1.0, -2.0]
    )
    assert made is not None and made.stretch is not None
    torch.testing.assert_close(made.stretch.out, 0.5 * out[0] - 2 * out[1])
    torch.testing.assert_close(made.stretch.into, -2 * into)
    assert made.includes == {"factors", "stretch_out", "stretch_in"}
    idle = RowFactors.of(bound(1, 1, stretches=(Stretch(out[0], None), None)), [0.0, 1.0])
    assert idle is not None and idle.stretch is None


def test_a_batch_s_table_names_each_rows_pages_and_zeros_behind_them(pools: list[Pool]) -> None:
    narrow, wide = carried(pools, 3), carried(pools, 20, full=True)
    factors = stack_factors([narrow, wide, None], BatchRows((2, 1, 2), "cpu"))
    assert factors is not None and factors.rest is not None
    assert factors.rows == 3, "rows without factors have none"
    pages = [list(part.bound.small.pages) for part in (narrow, narrow, wide)]
    assert factors.small.table.tolist() == [row + [0] * (4 - len(row)) for row in pages]
    assert wide.bound.rest is not None
    assert factors.rest.table.tolist() == [[0] * 4, [0] * 4, [*wide.bound.rest.pages, 0]]
    assert factors.scale.shape == (3, 32)
    assert factors.scale.sum(1).tolist() == [3, 3, 20]
    assert factors.small.A is pools[0].tensors[0], "pages are read where they are"


def test_equal_sets_of_equal_size_are_known_as_such(pools: list[Pool]) -> None:
    one, other = carried(pools, 3), carried(pools, 3)

    def rows_per_set(*parts: RowFactors, counts: tuple[int, ...]) -> int:
        factors = stack_factors(parts, BatchRows(counts, "cpu"))
        assert factors is not None
        return factors.rows_per_set

    assert rows_per_set(one, other, counts=(2, 2)) == 2
    assert rows_per_set(one, one, other, counts=(1, 1, 2)) == 2
    assert rows_per_set(one, other, counts=(1, 2)) == 0


def test_rows_without_a_stretch_are_stretched_by_nothing(pools: list[Pool]) -> None:
    plain = carried(pools, 3)
    vector: Tensor = torch.randn(SMALL.total_out)
    dora = RowFactors(plain.bound, plain.scale, Stretch(vector, None))
    factors = stack_factors([dora, plain], BatchRows((1, 2), "cpu"))
    assert factors is not None and factors.stretch_out is not None
    assert factors.stretch_in is None
    assert torch.equal(factors.stretch_out, torch.stack([vector, *torch.zeros(2, SMALL.total_out)]))


def test_a_batch_without_factors_has_none() -> None:
    assert stack_factors([None, None], BatchRows((1, 2), "cpu")) is None
