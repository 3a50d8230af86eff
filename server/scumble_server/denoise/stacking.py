"""What the rows of a batch carry, stacked into the inputs of one step.

`phases` are those of a batch's images in their order; an image is one model row, or
several: its negative prompt first, then the prompts that act against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import ContextInputs, ImageInputs, LiteInputs, NetInputs, StepInputs
from scumble_build.graphs.layout import PAGE, rank_bucket
from scumble_server.denoise.image import Row
from scumble_server.denoise.phase import Phase, RowContexts, RowFactors, RowImages, RowLite, RowNet
from scumble_server.executors.protocol import Net
from scumble_server.memory.pages import PageSet, table


@dataclass(frozen=True, slots=True)
class NetCall:
    """A ControlNet and the m model rows that ask for it: rows (m,), kv (m, T, K), hint (m, C, h, w), scale (m, n),
    added (m, E) or None, kv_mask (m, T) bool, True where a key is, or None where all are.
    """

    net: Net
    rows: Tensor
    kv: Tensor
    hint: Tensor
    scale: Tensor
    added: Tensor | None = None
    kv_mask: Tensor | None = None


def by_set(row: Row) -> tuple[bool, int]:
    """The order of rows in a batch: those with factors first, equal bound sets side by side."""
    factors = row.phase.factors
    return factors is None, id(factors.bound) if factors is not None else 0


def stack(phases: Sequence[Phase], device: str) -> StepInputs:
    """Everything that stays the same from step to step."""
    counts = [phase.kv.shape[0] for phase in phases]
    kv, mask = _stack_text([phase.kv for phase in phases])
    return StepInputs(
        kv.to(device),
        mask.to(device) if mask is not None else None,
        stack_factors([phase.factors for phase in phases], counts, device),
        _stack_images(_placed([phase.images for phase in phases], counts), device),
        features=_stack_features([phase.features for phase in phases], counts, device),
        contexts=_stack_contexts([phase.contexts for phase in phases], counts, device),
        lites=_stack_lites(phases, device),
        pooled=_stack_pooled([phase.pooled for phase in phases], device),
        sizes=_stack_sizes([phase.sizes for phase in phases], counts, device),
    )


def brings(phase: Phase) -> frozenset[Include]:
    """What its rows carry into a step, of what a graph may be without."""
    factors = phase.factors
    stretch = factors.stretch if factors is not None else None
    found: dict[Include, bool] = {
        "factors": factors is not None,
        "full": factors is not None and factors.bound.rest is not None,
        "stretch_out": stretch is not None and stretch.out is not None,
        "stretch_in": stretch is not None and stretch.into is not None,
        "images": phase.images is not None,
        "residuals": bool(phase.nets),
        "features": phase.features is not None,
    }
    return frozenset(name for name, carried in found.items() if carried)


def sizes_of(phase: Phase) -> dict[str, int]:
    """What its rows alone ask of a graph's axes; a batch asks for no more than the most of its rows."""
    found = {"tokens": phase.kv.shape[1]}
    if phase.factors is not None:
        found["rank_pages"] = rank_bucket(phase.factors.bound.rank) // PAGE
    if phase.images is not None:
        found["groups"], found["image_tokens"] = phase.images.kv.shape[1:3]
    return found


def _stack_pooled(pooled: Sequence[Tensor | None], device: str) -> Tensor | None:
    """(rows, E), or None: all rows of a batch are of one base."""
    present = [each for each in pooled if each is not None]
    return torch.cat(present).to(device) if present else None


def _stack_sizes(sizes: Sequence[tuple[int, ...] | None], counts: Sequence[int], device: str) -> Tensor | None:
    """(rows, 6), or None."""
    rows = [each for each, count in zip(sizes, counts, strict=True) if each is not None for _ in range(count)]
    return torch.tensor(rows, dtype=torch.float32, device=device) if rows else None


def _stack_text(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(b, T, K) each → (rows, T, K), and a mask where the lengths differ: padding between requests is masked."""
    longest = max(kv.shape[1] for kv in texts)
    if all(kv.shape[1] == longest for kv in texts):
        return torch.cat(list(texts)), None
    lengths = torch.cat([torch.full((len(kv),), kv.shape[1]) for kv in texts])
    padded = [pad(kv, (0, 0, 0, longest - kv.shape[1])) for kv in texts]
    return torch.cat(padded), torch.arange(longest) < lengths[:, None]


def stack_factors(carried: Sequence[RowFactors | None], counts: Sequence[int], device: str) -> Factors | None:
    """Which pages each row reads; `carried` has equal sets side by side, and all sets are in one pool."""
    present = [(factors, count) for factors, count in zip(carried, counts, strict=True) if factors is not None]
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
    holder = next((each.holder for each in sets if each is not None), None)
    if holder is None:
        return None
    assert all(each is None or each.holder is holder for each in sets), "sets of two pools in one batch"
    return Pages(*holder.tensors, table(sets, rank // PAGE).repeat_interleave(counts, 0).to(device))


def _rows_per_set(present: Sequence[tuple[RowFactors, int]]) -> int:
    """g, if every set has g rows, else 0."""
    rows: dict[int, int] = {}
    for factors, count in present:
        rows[id(factors.bound)] = rows.get(id(factors.bound), 0) + count
    sizes = set(rows.values())
    return sizes.pop() if len(sizes) == 1 else 0


def _stack_stretches(carried: Sequence[tuple[Tensor | None, int]], length: int, device: str) -> Tensor | None:
    """(m, length), 0 where a row has none or the small layout only; None if no row has any."""
    if all(vector is None for vector, _ in carried):
        return None
    rows = [
        (torch.zeros(length) if vector is None else pad(vector, (0, length - len(vector)))).expand(count, -1)
        for vector, count in carried
    ]
    return torch.cat(rows).to(device)


def factors_of(carried: RowFactors | None, rows: int, device: str) -> Factors | None:
    """One request's factors for all `rows` of a call of its own, as while encoding its prompts."""
    return stack_factors([carried], [rows], device)


def _placed(carried: Sequence[RowImages | None], counts: Sequence[int]) -> list[tuple[int, RowImages]]:
    """Each image's first model row, and what it carries of pictures; images without any are left out."""
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [(start, images) for start, images in zip(starts, carried, strict=False) if images is not None]


def _stack_images(placed: Sequence[tuple[int, RowImages]], device: str) -> ImageInputs | None:
    """A group that is missing has one token of zeros; a token that is missing is masked."""
    if not placed:
        return None
    groups = max(images.kv.shape[1] for _, images in placed)
    length = max(images.kv.shape[2] for _, images in placed)
    kv, tokens, scale = [], [], []
    for _, images in placed:
        count, present, here, _ = images.kv.shape
        more = groups - present
        kv.append(pad(images.kv, (0, 0, 0, length - here, 0, more)))
        present_tokens = pad(images.tokens, (0, length - here, 0, more))
        present_tokens[present:, 0] = True  # a softmax over nothing would be NaN
        tokens.append(present_tokens.expand(count, -1, -1))
        scale.append(pad(images.scale, (0, more)))
    there = torch.cat(tokens)
    return ImageInputs(
        torch.cat([torch.arange(start, start + len(images.kv)) for start, images in placed]).to(device),
        torch.cat(kv).to(device),
        None if there.all() else there.to(device),
        torch.cat(scale).to(device),
        _stack_areas(placed, groups, device),
    )


def _stack_areas(placed: Sequence[tuple[int, RowImages]], groups: int, device: str) -> Tensor | None:
    """(m, G, P), or None if no image has areas; where one has none its groups reach everywhere."""
    positions = next((images.areas.shape[1] for _, images in placed if images.areas is not None), None)
    if positions is None:
        return None
    parts = []
    for _, images in placed:
        areas = torch.ones(images.kv.shape[1], positions) if images.areas is None else images.areas
        parts.append(pad(areas, (0, 0, 0, groups - len(areas))).expand(len(images.kv), -1, -1))
    return torch.cat(parts).to(device)


def _stack_features(
    carried: Sequence[tuple[Tensor, ...] | None], counts: Sequence[int], device: str
) -> tuple[Tensor, ...] | None:
    """(rows, C, h, w) for each down block, zero in rows that have none."""
    pattern = next((features for features in carried if features is not None), None)
    if pattern is None:
        return None
    return tuple(
        torch.cat(
            [
                (torch.zeros_like(like) if features is None else features[block]).expand(count, -1, -1, -1)
                for features, count in zip(carried, counts, strict=True)
            ]
        ).to(device)
        for block, like in enumerate(pattern)
    )


def _stack_contexts(
    carried: Sequence[RowContexts | None], counts: Sequence[int], device: str
) -> tuple[ContextInputs, ...]:
    """One for each chain of hypernetworks; images with the same chain, at whatever strengths, share it."""
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    chains: dict[tuple[int, ...], list[tuple[Tensor, RowContexts]]] = {}
    for start, count, contexts in zip(starts, counts, carried, strict=False):
        if contexts is not None:
            rows = torch.arange(start, start + count)
            chains.setdefault(tuple(map(id, contexts.nets)), []).append((rows, contexts))
    return tuple(
        ContextInputs(
            torch.cat([rows for rows, _ in members]).to(device),
            members[0][1].nets,
            torch.cat([contexts.strength.expand(len(rows), -1) for rows, contexts in members]).to(device),
        )
        for members in chains.values()
    )


def _stack_lites(phases: Sequence[Phase], device: str) -> tuple[LiteInputs, ...]:
    """One for each LLLite; model rows on which it does not act are left out of it."""
    starts = torch.tensor([0, *(phase.kv.shape[0] for phase in phases)]).cumsum(0).tolist()
    asking: dict[int, list[tuple[Tensor, Tensor, RowLite]]] = {}
    for start, phase in zip(starts, phases, strict=False):
        for lite in phase.lites:
            acts = lite.strength.nonzero()[:, 0]
            if len(acts):
                asking.setdefault(id(lite.net), []).append((start + acts, lite.strength[acts], lite))
    return tuple(
        LiteInputs(
            torch.cat([rows for rows, _, _ in members]).to(device),
            members[0][2].net,
            {
                target: torch.cat([lite.embeddings[target].expand(len(rows), -1, -1) for rows, _, lite in members])
                for target in members[0][2].embeddings
            },
            torch.cat([strength for _, strength, _ in members]).to(device),
        )
        for members in asking.values()
    )


def stack_nets(phases: Sequence[Phase], device: str) -> list[NetCall]:
    """One call for each net; model rows in which it has no say are left out of it."""
    starts = torch.tensor([0, *(phase.kv.shape[0] for phase in phases)]).cumsum(0).tolist()
    asking: dict[int, list[tuple[int, RowNet]]] = {}
    for start, phase in zip(starts, phases, strict=False):
        for carried in phase.nets:
            asking.setdefault(id(carried.net), []).append((start, carried))
    calls = (_net_call(carried, device) for carried in asking.values())
    return [call for call in calls if len(call.rows)]


def _net_call(asking: Sequence[tuple[int, RowNet]], device: str) -> NetCall:
    rows, kv, hint, scale, added = [], [], [], [], []
    for start, carried in asking:
        runs = carried.scale.any(1).nonzero()[:, 0]
        rows.append(start + runs)
        kv.append(carried.kv[runs])
        hint.append(carried.hint.expand(len(runs), -1, -1, -1))
        scale.append(carried.scale[runs])
        if carried.added is not None:
            added.append(carried.added[runs])
    texts, mask = _stack_text(kv)
    return NetCall(
        asking[0][1].net,
        torch.cat(rows).to(device),
        texts.to(device),
        torch.cat(hint).to(device),
        torch.cat(scale).to(device),
        torch.cat(added).to(device) if added else None,
        mask.to(device) if mask is not None else None,
    )


def with_residuals(inputs: StepInputs, calls: Sequence[NetCall], sample: Tensor, timestep: Tensor) -> StepInputs:
    """sample (rows, 4, h, w) and timestep (rows,) are what the denoiser gets."""
    if not calls:
        return inputs
    total: list[Tensor] | None = None
    for call in calls:
        carried = NetInputs(call.kv, call.hint, call.added, call.kv_mask)
        residuals = call.net.residuals(sample[call.rows], timestep[call.rows], carried)
        if total is None:
            total = [each.new_zeros(len(sample), *each.shape[1:]) for each in residuals]
        for i, residual in enumerate(residuals):
            total[i].index_add_(0, call.rows, residual * call.scale[:, i, None, None, None])
    assert total is not None
    return replace(inputs, residuals=tuple(total))
