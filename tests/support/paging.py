"""Random factors in rank pages, and what stands in them, by arithmetic of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.layout import PAGE, Extent, Layout, Target


def some_factors(
    layout: Layout,
    sets: Sequence[int],
    rank: int,
    *,
    full: bool = False,
    size: float = 1.0,
    scale: float | None = None,
    rows_per_set: int = 0,
    stretch: float = 0.0,
    generator: torch.Generator | None = None,
) -> Factors:
    """Row i carries set `sets[i]`; sets' pages lie in no order. `scale` None draws one for each column."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pages = -(-rank // PAGE)
    count = (max(sets) + 1) * pages
    order = torch.randperm(count, generator=generator).view(-1, pages)
    table = order[torch.tensor(list(sets))]

    def pool(extent: Extent) -> Pages:
        return Pages(size * random(count, PAGE * extent.total_in), size * random(count, PAGE * extent.total_out), table)

    extent, rows = layout.full if full else layout.small, len(sets)
    return Factors(
        pool(layout.small),
        pool(layout.rest) if full else None,
        random(rows, PAGE * pages) if scale is None else torch.full((rows, PAGE * pages), scale),
        rows_per_set,
        stretch * random(rows, extent.total_out) if stretch else None,
        stretch * random(rows, extent.total_in) if stretch else None,
    )


def columns(factors: Factors, layout: Layout, target: Target, row: int) -> tuple[Tensor, Tensor]:
    """Of one row and layer: down (rank, fan_in) and up (rank, fan_out), the scale not in them."""
    behind = target.in_offset >= layout.small.total_in
    pages = factors.rest if behind else factors.small
    assert pages is not None
    before = layout.small if behind else Extent(0, 0)
    found = []
    for tensor, offset, width in (
        (pages.A, target.in_offset - before.total_in, target.fan_in),
        (pages.B, target.out_offset - before.total_out, target.fan_out),
    ):
        blocks = [tensor[page] for page in pages.table[row].tolist()]
        found.append(torch.cat([block[PAGE * offset :][: PAGE * width].view(PAGE, width) for block in blocks]))
    return found[0], found[1]
