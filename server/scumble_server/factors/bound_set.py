"""The factors of the LoRAs of one request, in rank pages, as a graph reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from scumble_build.graphs.layout import PAGE
from scumble_server.memory.pages import PageSet, Pool


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """The gain − 1 of one DoRA at weight 1, on the output axis (Σout,) and on the input axis (Σin,)."""

    out: Tensor | None
    into: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class BoundSet:
    """The factors of an ordered set of LoRAs, in rank pages; `rest` is None if none of them reaches beyond the small
    layout.

    `ranks[i]` columns belong to LoRA i; the columns behind the last are zero. `stretches[i]` is None unless LoRA i
    is a DoRA. `layers[i]` are the targets at which LoRA i changes something.
    """

    small: PageSet
    rest: PageSet | None
    ranks: tuple[int, ...]
    stretches: tuple[Stretch | None, ...] = ()
    layers: tuple[frozenset[str], ...] = ()

    @property
    def rank(self) -> int:
        return PAGE * len(self.small.pages)


def move_to_pools(bound: BoundSet, pools: Sequence[Pool]) -> BoundSet:
    """Copy a set into its pools: small layout, and rest if it has any. Raises OutOfMemory, Refused; then nothing is
    left there.
    """
    small_pool, *rest_pools = pools
    small = small_pool.put(*bound.small.holder.tensors)
    try:
        rest = None if bound.rest is None else rest_pools[0].put(*bound.rest.holder.tensors)
    except BaseException:
        small_pool.drop(small)
        raise
    return replace(bound, small=small, rest=rest)


def release_pages(bound: BoundSet | None) -> None:
    """Give the pages of a set that nobody steps with any more back to their pools."""
    for part in (bound.small, bound.rest) if bound is not None else ():
        if part is not None and isinstance(part.holder, Pool):
            part.holder.drop(part)
