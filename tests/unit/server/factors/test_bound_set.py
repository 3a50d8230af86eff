"""A set moves to the pools whole or not at all, and gives its pages back once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scumble.errors import Refused
from scumble_build.graphs.layout import PAGE, Extent
from scumble_server.factors.bound_set import BoundSet, move_to_pools, release_pages
from scumble_server.memory.pages import PageSet, Pool

SMALL, REST = Extent(4, 3), Extent(6, 2)


def pages(extent: Extent, count: int) -> PageSet:
    return PageSet.own(torch.randn(count, PAGE * extent.total_in), torch.randn(count, PAGE * extent.total_out))


def pool(extent: Extent, most: int | None = None) -> Pool:
    return Pool(extent, torch.device("cpu"), torch.float32, most)


def test_what_was_moved_reads_as_before_and_can_be_given_back() -> None:
    own = BoundSet(pages(SMALL, 2), pages(REST, 2), (9,))
    pools = [pool(SMALL), pool(REST)]
    free = [each.free for each in pools]
    moved = move_to_pools(own, pools)
    assert moved.rank == own.rank == 2 * PAGE
    for here, there in ((own.small, moved.small), (own.rest, moved.rest)):
        assert here is not None and there is not None
        for mine, theirs in zip(here.holder.tensors, there.holder.tensors, strict=True):
            assert torch.equal(mine, theirs[list(there.pages)])
    assert [each.free for each in pools] == [count - 2 for count in free]
    release_pages(moved)
    assert [each.free for each in pools] == free


def test_a_set_of_its_own_and_none_at_all_have_nothing_to_give_back() -> None:
    release_pages(None)
    release_pages(BoundSet(pages(SMALL, 1), None, (8,)))


def test_where_the_rest_finds_no_place_nothing_stays() -> None:
    pools = [pool(SMALL), pool(REST, most=2)]
    free = pools[0].free
    with pytest.raises(Refused, match="rank pages"):
        move_to_pools(BoundSet(pages(SMALL, 3), pages(REST, 3), (24,)), pools)
    assert pools[0].free == free
    assert move_to_pools(replace(BoundSet(pages(SMALL, 3), None, (24,))), pools).rest is None
