"""The LoRAs of one request, bound for every graph that takes factors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from scumble_build.graphs.layout import PAGE, RANK_BUCKETS, Layout, pages_for
from scumble_server.executors.device import uploads
from scumble_server.executors.protocol import Executor
from scumble_server.factors.binding import Piece, bind
from scumble_server.factors.bound_set import BoundSet, move_to_pools, release_pages
from scumble_server.factors.rows import RowFactors
from scumble_server.memory.pages import PageSet
from scumble_server.methods.context import Context
from scumble_server.methods.method import Lora
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True)
class RequestFactors:
    """The bound sets of one request's LoRAs. `key` names all that they were made of."""

    loras: tuple[Lora, ...]
    key: Hashable
    texts: tuple[BoundSet | None, ...]
    """For each text encoder."""
    kv: BoundSet | None
    step: BoundSet | None

    def layers(self) -> dict[ResolvedAdapter, frozenset[str]]:
        """The targets at which each LoRA changes something, of all graphs."""
        sets = [bound for bound in (*self.texts, self.kv, self.step) if bound is not None]
        return {
            lora.adapter: frozenset[str]().union(*(bound.layers[index] for bound in sets))
            for index, lora in enumerate(self.loras)
        }

    def of_text(self, encoder: int) -> RowFactors | None:
        """The factors in text encoder number `encoder`, where weights follow no schedule."""
        return self._at(self.texts[encoder], [lora.adapter.text_weight for lora in self.loras])

    def of_kv(self, weights: Mapping[ResolvedAdapter, float]) -> RowFactors | None:
        """The factors in the projection of text to keys and values."""
        return self._at(self.kv, [weights[lora.adapter] for lora in self.loras])

    def of_step(self, weights: Mapping[ResolvedAdapter, float]) -> RowFactors | None:
        """The factors in the denoiser."""
        return self._at(self.step, [weights[lora.adapter] for lora in self.loras])

    def _at(self, bound: BoundSet | None, weights: Sequence[float]) -> RowFactors | None:
        return RowFactors.of(bound, weights, (self.key, tuple(weights)))


def bind_for_request(context: Context, loras: Sequence[Lora], without: frozenset[str]) -> RequestFactors:
    """Bind all targets but those `without`; sets that are resident are found. Raises Refused, OutOfMemory."""
    executor = context.executor
    return RequestFactors(
        tuple(loras),
        (tuple(lora.identity(context) for lora in loras), without),
        tuple(_bind(context, f"text {i}", layout, loras, without) for i, layout in enumerate(executor.text_layouts)),
        _bind(context, "kv", executor.kv_layout, loras, without),
        _bind(context, "step", executor.step_layout, loras, without, pooled=True),
    )


def targets_to_merge(executor: Executor, loras: Sequence[Lora]) -> frozenset[str]:
    """The targets at which these LoRAs are merged into copies of the weights, because factors cannot hold them.

    These are the targets that one of them changes in a way that no factors express; all targets, if together they need
    more rank columns than the largest bucket has, in any graph.
    """
    layouts = *executor.text_layouts, executor.kv_layout, executor.step_layout
    inexpressible = frozenset[str]().union(*(lora.merged for lora in loras))
    if any(_columns(layout, loras, inexpressible) > RANK_BUCKETS[-1] for layout in layouts):
        return frozenset(target for lora in loras for target in lora.targets)
    return inexpressible


def bound_bytes(layout: Layout, loras: Sequence[Lora], itemsize: int, without: frozenset[str] = frozenset()) -> int:
    """Return the size of the bound set of these in one graph, before any of it is read."""
    names = {name for lora in loras for name in lora.compatibility.ranks if name in layout.targets} - without
    if not names:
        return 0
    extent = layout.extent(names)
    pages = max(pages_for(_columns(layout, loras, without)), 1)
    stretches = 4 * sum(lora.depends_on_weights for lora in loras)
    return (extent.total_in + extent.total_out) * (PAGE * pages * itemsize + stretches)


def _columns(layout: Layout, loras: Sequence[Lora], without: frozenset[str]) -> int:
    return sum(lora.columns(layout, without) for lora in loras)


def _bind(
    context: Context,
    graph: str,
    layout: Layout,
    loras: Sequence[Lora],
    without: frozenset[str],
    *,
    pooled: bool = False,
) -> BoundSet | None:
    """`pooled`: in the pools that batches read, or in memory of its own."""
    executor = context.executor
    weights = context.weights.key if any(lora.depends_on_weights for lora in loras) else None
    identities = (lora.identity(context) for lora in loras)
    key = ("factors", graph, layout.digest, executor.dtype, weights, without, *identities)
    nbytes = bound_bytes(layout, loras, executor.dtype.itemsize, without)

    def make() -> BoundSet | None:
        pieces = [Piece(lora.read(context), lora.adapter.blocks) for lora in loras]
        bound = bind(layout, pieces, executor.weight, without)
        if bound is None:
            return None
        if not pooled:
            sent = uploads(executor.device).send(*bound.small.holder.tensors, dtype=executor.dtype)
            return replace(bound, small=PageSet.own(*sent))
        device, dtype = torch.device(executor.device), executor.dtype
        parts = zip((bound.small, bound.rest), (layout.small, layout.rest), executor.most_pages, strict=True)
        return move_to_pools(
            bound, [context.pools.of(extent, device, dtype, most) for part, extent, most in parts if part is not None]
        )

    return context.device.get(key, nbytes, make, drop=release_pages if pooled else None)
