"""What the rows of a request carry in one phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from scumble_server.denoise.phase import Phase
from scumble_server.factors.merging import merge
from scumble_server.factors.request import RequestFactors
from scumble_server.factors.rows import RowFactors
from scumble_server.methods import by_method
from scumble_server.methods.context import Context, Text
from scumble_server.methods.method import TextChange
from scumble_server.request.adapter import ResolvedAdapter


def make_phase(
    context: Context,
    weights: Mapping[ResolvedAdapter, float],
    factors: RequestFactors,
    to_merge: frozenset[str],
    text: Text,
) -> Phase:
    """Make what rows carry while the adapters have these weights and `text` is read.

    LoRAs are merged into the UNet's weights at the targets `to_merge`. Raises Refused, OutOfMemory.
    """
    context = replace(context, weights=merge(context, factors.loras, weights, "unet", to_merge))
    for_kv, for_step = factors.of_kv(weights), factors.of_step(weights)
    parts, changes = {}, []
    for method, own in by_method(weights):
        if (part := method.carry(context, own, text)) is not None:
            parts[method.kind] = part
        if (change := method.text_change(context, own)) is not None:
            changes.append(change)
    has_sizes = context.base.family.sizes
    phase = Phase(
        context.executor,
        _project(context, text, for_kv, changes),
        for_step,
        parts,
        pooled=text.pooled if has_sizes else None,
        sizes=context.settings.sizes if has_sizes else None,
    )
    context.executor.prepare(phase.includes, phase.axes | context.latents)
    return phase


def _project(context: Context, text: Text, factors: RowFactors | None, changes: list[TextChange]) -> Tensor:
    """Project the text to keys and values, `(rows, T, K)`."""
    executor, states = context.executor, text.states
    key = (
        "kv",
        context.weights.key,
        text.key,
        factors.key if factors is not None else None,
        tuple(change.key for change in changes),
    )
    nbytes = states.shape[0] * states.shape[1] * executor.kv_layout.full.total_out * states.element_size()

    def project() -> Tensor:
        keys = values = states
        for change in changes:
            keys, values = change.apply(keys, values)
        rows = factors.alone(len(states), executor.device) if factors is not None else None
        return executor.project(keys, rows, values)

    return context.device.get(key, nbytes, project)
