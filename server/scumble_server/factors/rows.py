"""What rows carry of LoRAs, and how it is stacked into a batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.layout import PAGE, rank_bucket
from scumble_server.factors.bound_set import BoundSet, Stretch
from scumble_server.memory.pages import PageSet, table
from scumble_server.methods.part import BatchRows, Part


@dataclass(frozen=True, slots=True, eq=False)
class RowFactors(Part):
    """What the rows of one request carry into a graph: a bound set, and a scale for each of its columns.

    scale `(rank,)` float32 is the weight of each column's LoRA; `stretch` that of all DoRAs at their weights, or None.
    `key` names set and weights: what is made with these factors is kept by it.
    """

    bound: BoundSet
    scale: Tensor
    stretch: Stretch | None = None
    key: Hashable = None

    @classmethod
    def of(cls, bound: BoundSet | None, weights: Sequence[float], key: Hashable = None) -> RowFactors | None:
        """Give LoRA i of the set the weight `weights[i]`. None if no LoRA is left."""
        if bound is None or not any(weights):
            return None
        scale = torch.cat(
            [torch.full((width,), float(weight)) for width, weight in zip(bound.ranks, weights, strict=True)]
        )
        return cls(bound, pad(scale, (0, bound.rank - len(scale))), _sum(bound.stretches, weights), key)

    @property
    def includes(self) -> frozenset[Include]:
        stretch = self.stretch
        optional: dict[Include, bool] = {
            "full": self.bound.rest is not None,
            "stretch_out": stretch is not None and stretch.out is not None,
            "stretch_in": stretch is not None and stretch.into is not None,
        }
        return frozenset[Include]({"factors"}).union(name for name, is_there in optional.items() if is_there)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"rank_pages": rank_bucket(self.bound.rank) // PAGE}

    @classmethod
    def stack(cls, parts: Sequence[RowFactors | None], rows: BatchRows, inputs: StepInputs) -> StepInputs:
        return replace(inputs, factors=stack_factors(parts, rows))

    def alone(self, rows: int, device: str) -> Factors:
        """The factors for all `rows` of a call of this request's own, as while its prompts are encoded."""
        factors = stack_factors([self], BatchRows((rows,), device))
        assert factors is not None
        return factors


def _sum(stretches: Sequence[Stretch | None], weights: Sequence[float]) -> Stretch | None:
    """Add up stretches at their weights. None if there are none."""
    weighted = [
        (stretch, weight) for stretch, weight in zip(stretches, weights, strict=True) if stretch is not None and weight
    ]
    if not weighted:
        return None

    def total(vectors: Iterable[tuple[Tensor | None, float]]) -> Tensor | None:
        terms = [vector * weight for vector, weight in vectors if vector is not None]
        return torch.stack(terms).sum(0) if terms else None

    return Stretch(
        total((stretch.out, weight) for stretch, weight in weighted),
        total((stretch.into, weight) for stretch, weight in weighted),
    )


def stack_factors(of_images: Sequence[RowFactors | None], rows: BatchRows) -> Factors | None:
    """Tell each row which pages it reads. None if no image has factors.

    `of_images` has one for each image, equal sets side by side, None last; all sets are in one pool.
    """
    device = rows.device
    present = [(factors, count) for factors, count in zip(of_images, rows.counts, strict=True) if factors is not None]
    if not present:
        return None
    rank = rank_bucket(max(factors.bound.rank for factors, _ in present))
    of_rows = torch.tensor([count for _, count in present])
    small = _stack_pages([factors.bound.small for factors, _ in present], of_rows, rank, device)
    rest = _stack_pages([factors.bound.rest for factors, _ in present], of_rows, rank, device)
    assert small is not None
    parts = [small] if rest is None else [small, rest]
    out = [(factors.stretch.out if factors.stretch else None, count) for factors, count in present]
    into = [(factors.stretch.into if factors.stretch else None, count) for factors, count in present]
    return Factors(
        small,
        rest,
        torch.cat(
            [pad(factors.scale, (0, rank - len(factors.scale))).expand(count, -1) for factors, count in present]
        ).to(device),
        rows_per_set=_rows_per_set(present),
        stretch_out=_stack_stretches(out, sum(part.B.shape[1] for part in parts) // PAGE, device),
        stretch_in=_stack_stretches(into, sum(part.A.shape[1] for part in parts) // PAGE, device),
    )


def _stack_pages(sets: Sequence[PageSet | None], counts: Tensor, rank: int, device: str) -> Pages | None:
    """None if no set has any."""
    holder = next((pages.holder for pages in sets if pages is not None), None)
    if holder is None:
        return None
    assert all(pages is None or pages.holder is holder for pages in sets), "sets of two pools in one batch"
    return Pages(*holder.tensors, table(sets, rank // PAGE).repeat_interleave(counts, 0).to(device))


def _rows_per_set(present: Sequence[tuple[RowFactors, int]]) -> int:
    """Return g if every set has g rows, else 0."""
    rows: dict[int, int] = {}
    for factors, count in present:
        rows[id(factors.bound)] = rows.get(id(factors.bound), 0) + count
    sizes = set(rows.values())
    return sizes.pop() if len(sizes) == 1 else 0


def _stack_stretches(of_images: Sequence[tuple[Tensor | None, int]], length: int, device: str) -> Tensor | None:
    """(m, length), 0 where a row has none or the small layout only; None if no row has any."""
    if all(vector is None for vector, _ in of_images):
        return None
    rows = [
        (torch.zeros(length) if vector is None else pad(vector, (0, length - len(vector)))).expand(count, -1)
        for vector, count in of_images
    ]
    return torch.cat(rows).to(device)
