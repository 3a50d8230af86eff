"""What a row carries from the adapters of its request: plain tensors, made once, read at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scumble_build.graphs.hypernetwork import Hypernetwork
from scumble_build.graphs.layout import PAGE
from scumble_build.graphs.lllite import Embeddings, LLLite
from scumble_server.executors.protocol import Executor, Net
from scumble_server.memory.pages import PageSet, Pool


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """What one DoRA at strength 1 adds to the 1 by which the base's weights are stretched: out (Σout,), into (Σin,)."""

    out: Tensor | None
    into: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class BoundSet:
    """The factors of an ordered set of LoRAs, in rank pages; `rest` is None if none of them reaches beyond the small
    layout.

    `ranks[i]` columns belong to LoRA i; the columns behind the last are zero. `stretches[i]` is None unless LoRA i
    is a DoRA.
    """

    small: PageSet
    rest: PageSet | None
    ranks: tuple[int, ...]
    stretches: tuple[Stretch | None, ...] = ()

    @property
    def rank(self) -> int:
        return PAGE * len(self.small.pages)


def hold(bound: BoundSet, pools: Sequence[Pool]) -> BoundSet:
    """The same in pools: of the small layout, and of the rest. Raises OutOfMemory, Refused; then nothing is held."""
    small_pool, rest_pool = pools
    small = small_pool.put(*bound.small.holder.tensors)
    try:
        rest = None if bound.rest is None else rest_pool.put(*bound.rest.holder.tensors)
    except BaseException:
        small_pool.drop(small)
        raise
    return replace(bound, small=small, rest=rest)


def let_go(bound: BoundSet | None) -> None:
    """What pools hold of a set that nobody steps with any more."""
    for part in (bound.small, bound.rest) if bound is not None else ():
        if part is not None and isinstance(part.holder, Pool):
            part.holder.drop(part)


@dataclass(frozen=True, slots=True, eq=False)
class RowFactors:
    """What the rows of one request carry into a graph: a bound set and its scale per column, (rank,) float32.

    `stretch` is that of all its DoRAs at their strengths, or None.
    """

    bound: BoundSet
    scale: Tensor
    stretch: Stretch | None = None


def spread(sides: Tensor, rows: int) -> Tensor:
    """`(1|2, …)`, of the prompt or of negative prompt and prompt → one for each model row, `(rows, …)`."""
    if len(sides) == rows:
        return sides
    return torch.cat([sides[:1], sides[1:].expand(rows - 1, *sides.shape[1:])])


@dataclass(frozen=True, slots=True, eq=False)
class RowImages:
    """IP-Adapters of one request: G groups with a softmax each, T tokens. `rows` is as in `Phase`.

    kv `(rows, G, T, K)` in the flat layout of the text's, layer scales folded into V; tokens `(G, T)` bool, True where
    a token is, at least one in each group; scale `(rows, G)`; areas `(G, P)`, flat over the UNet's levels, or None.
    """

    kv: Tensor
    tokens: Tensor
    scale: Tensor
    areas: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RowNet:
    """One ControlNet of one request. `added`, of a net for SDXL, is what the pooled text and the sizes add to its time.

    kv `(rows, T, K)`, the net's own of the text; hint `(1, C, H/8, W/8)`, the embedded control picture;
    scale `(rows, n)`, for each residual, the middle block's last; added `(rows, E)`. The net does not run for a row of
    zeros.
    """

    net: Net
    kv: Tensor
    hint: Tensor
    scale: Tensor
    added: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RowContexts:
    """Hypernetworks on what self-attention reads, one behind the other: those of one request, strength `(n,)`."""

    nets: tuple[Hypernetwork, ...]
    strength: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowLite:
    """One ControlNet-LLLite of one request, its picture embedded `(1, N, e)` for each target; strength `(rows,)`."""

    net: LLLite
    embeddings: Embeddings
    strength: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """A stretch of a schedule in which the same adapters act and the same texts are read.

    `executor` holds the weights: the base's, or a variant's. kv `(rows, T, K)` for each model row of an image: the
    prompt alone, or the negative prompt and then the prompts that act against it. features: T2I-Adapter's, for each
    down block `(1, C, h, w)` or `(rows, C, h, w)`. pooled `(rows, E)` and `sizes` are SDXL's (`StepInputs`).
    """

    executor: Executor
    kv: Tensor
    factors: RowFactors | None = None
    images: RowImages | None = None
    nets: tuple[RowNet, ...] = ()
    features: tuple[Tensor, ...] | None = None
    contexts: RowContexts | None = None
    lites: tuple[RowLite, ...] = ()
    pooled: Tensor | None = None
    sizes: tuple[int, ...] | None = None
