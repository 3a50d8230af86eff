"""Rank pages: put, found again, given back, moved when there are too few."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scumble.errors import Refused
from scumble_build.graphs.layout import PAGE, Extent
from scumble_server.factors.bound_set import BoundSet, move_to_pools, release_pages
from scumble_server.memory.pages import PageSet, Pool, Pools, page_bytes, table

EXTENT = Extent(5, 3)
CPU = torch.device("cpu")


def pages(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, PAGE * EXTENT.total_in), torch.randn(count, PAGE * EXTENT.total_out)


def read(held: PageSet) -> tuple[Tensor, ...]:
    return tuple(tensor[list(held.pages)] for tensor in held.holder.tensors)


def small_pool(most: int | None = None) -> Pool:
    return Pool(EXTENT, CPU, torch.float32, most)


def test_what_is_put_is_found_again_and_page_zero_stays_zeros() -> None:
    pool = small_pool()
    known = [(given := pages(count), pool.put(*given)) for count in (1, 4, 2, 16, 3, 40)]
    for given, held in known:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(read(held), given, strict=True))
    numbers = [page for _, held in known for page in held.pages]
    assert len(set(numbers)) == len(numbers) == 66
    assert 0 not in numbers
    assert all(not tensor[0].any() for tensor in pool.tensors)


def test_pages_that_were_dropped_are_used_again() -> None:
    pool = small_pool()
    for _ in range(50):
        held = pool.put(*pages(7))
        pool.drop(held)
    assert len(pool.tensors[0]) == 8


def test_who_stacked_the_old_pages_keeps_them_when_they_move() -> None:
    pool = small_pool()
    first = pool.put(*pages(3))
    old, before = pool.tensors, read(first)
    pool.put(*pages(30))
    assert pool.tensors[0].data_ptr() != old[0].data_ptr()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(read(first), before, strict=True))
    assert all(torch.equal(tensor[list(first.pages)], theirs) for tensor, theirs in zip(old, before, strict=True))


def test_no_more_pages_than_graphs_take() -> None:
    pool = small_pool(most=20)
    held = pool.put(*pages(17))
    with pytest.raises(Refused, match=r"20 rank pages.*--device-cache"):
        pool.put(*pages(3))
    pool.drop(held)
    pool.put(*pages(19))


def test_a_pool_for_engines_has_all_its_pages_from_the_start_and_never_moves() -> None:
    pool = small_pool(most=20)
    before = pool.tensors
    pool.put(*pages(19))
    assert pool.tensors is before
    assert len(before[0]) == len(before[1]) == 20


def test_it_is_no_larger_than_the_budget_lets_it_fill() -> None:
    size = page_bytes(EXTENT, torch.float32)
    assert size == sum(page.nbytes for page in pages(1))
    known = Pools(10 * size + 1)
    assert len(known.of(EXTENT, CPU, torch.float32, 20).tensors[0]) == 11, "and page 0, which is no set's"
    assert len(known.of(EXTENT, CPU, torch.float32, 5).tensors[0]) == 5
    assert len(known.of(EXTENT, CPU, torch.float32).tensors[0]) == 8, "that which grows starts small on a CPU"
    known.of(EXTENT, CPU, torch.float32, 20).put(*pages(10))


def test_a_pool_that_was_made_within_a_step_is_written_outside_it() -> None:
    with torch.inference_mode():
        pool = small_pool()
    pool.put(*pages(2))
    pool.put(*pages(20))


def test_a_set_that_does_not_fit_holds_nothing() -> None:
    small, rest = small_pool(), small_pool(most=4)
    own = BoundSet(PageSet.own(*pages(6)), PageSet.own(*pages(6)), (48,))
    free = small.free
    with pytest.raises(Refused):
        move_to_pools(own, [small, rest])
    assert small.free == free


def test_an_upload_that_fails_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = small_pool()
    free = pool.free

    @dataclass
    class Broken:
        def write(self, *_: object) -> None:
            raise RuntimeError("the wire was cut")

    monkeypatch.setattr(pool, "_uploads", Broken())
    with pytest.raises(RuntimeError, match="wire"):
        pool.put(*pages(2))
    assert pool.free == free


def test_what_is_let_go_is_free_again() -> None:
    small, rest = small_pool(), small_pool()
    free = small.free, rest.free
    bound = move_to_pools(BoundSet(PageSet.own(*pages(2)), PageSet.own(*pages(2)), (16,)), [small, rest])
    assert (small.free, rest.free) == (free[0] - 2, free[1] - 2)
    release_pages(bound)
    release_pages(None)
    release_pages(BoundSet(PageSet.own(*pages(2)), None, (16,)))
    assert (small.free, rest.free) == free


def test_bases_of_one_kind_share_a_pool() -> None:
    known = Pools()
    assert known.of(EXTENT, CPU, torch.float32) is known.of(Extent(5, 3), CPU, torch.float32)
    assert known.of(EXTENT, CPU, torch.float32) is not known.of(EXTENT, CPU, torch.float16)
    assert known.of(EXTENT, CPU, torch.float32) is not known.of(Extent(5, 4), CPU, torch.float32)


def test_a_table_names_zeros_behind_a_narrow_set() -> None:
    own = PageSet.own(*pages(2))
    assert table([own, None, PageSet(own.holder, (7, 3, 5))], 4).tolist() == [[0, 1, 0, 0], [0] * 4, [7, 3, 5, 0]]
    assert table([own], 2).dtype is torch.int64
