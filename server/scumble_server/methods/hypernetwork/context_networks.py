"""Hypernetworks, of two kinds.

One that predicts a LoRA (`predictor.py`) is from there a LoRA: `lora.part_of` and `lora.record_of` know it.

One of the webui's kind changes what attention reads its keys and values from: c + strength · n_k(c) for keys and
c + strength · n_v(c) for values, for every attention whose context has a width that it has networks for, in the order
of the request. For cross-attention that is the text, once per phase; self-attention carries the networks into the step.
The texts that ControlNets read and the pictures of IP-Adapters stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter
from scumble_build.graphs.hypernetwork import Hypernetwork, parameters_of
from scumble_registry.compatibility import ContextNetworks, HypernetworkCompatibility
from scumble_registry.formats.hypernetwork import KIND, read_record
from scumble_server.base import Base
from scumble_server.denoise.phase import RowContexts
from scumble_server.methods import lora
from scumble_server.methods.context import Context
from scumble_server.methods.hypernetwork import predictor as predicted
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings

FIELDS = frozenset({"text_weight", "blocks", "start", "end", "images", "text"})
_FIELDS_OF_PREDICTORS = FIELDS - {"start", "end"}


@dataclass(frozen=True, slots=True)
class Link:
    """One hypernetwork of a chain, at its strength in this phase. `digest` is its version's."""

    digest: str
    net: Hypernetwork
    strength: float


def networks_of(bound: Bound) -> ContextNetworks | None:
    """None for what is no hypernetwork of the webui's kind."""
    compatibility = bound.version.manifest.compatibility
    if not isinstance(compatibility, HypernetworkCompatibility):
        return None
    return compatibility.network if isinstance(compatibility.network, ContextNetworks) else None


def check(bound: Bound, base: Base) -> None:
    """Raises InvalidRequest for a field that this kind of hypernetwork has no use for, and what `predicted` raises."""
    predictor = predicted.predictor_of(bound)
    if predictor is not None:
        predicted.check(bound, predictor, base)
        lora.check(bound, base)
        return
    for name in sorted(_FIELDS_OF_PREDICTORS):
        if getattr(bound.spec, name) != Adapter.model_fields[name].default:
            raise InvalidRequest(
                f"{bound.spec.ref} is a hypernetwork on attention's context, for which {name} means nothing; "
                "leave it out",
                field=f"adapters.{name}",
            )
    networks = networks_of(bound)
    assert networks is not None
    if not base.changes_graphs and set(networks.widths) & base.compatibility.self_attention_widths:
        raise Refused(
            f"{bound.spec.ref} is a hypernetwork on self-attention, which changes the graph, and this server's graphs "
            "are fixed; ask a server that runs with --executor torch",
            ref=bound.spec.ref,
        )


def check_together(adapters: Sequence[Bound], base: Base, settings: Settings) -> None:
    """Any number may act at once."""


def idle(bound: Bound, steps: int) -> str | None:
    if predicted.predictor_of(bound) is not None:
        return lora.idle(bound, steps)
    return bound.why_never(steps)


def describe(bound: Bound) -> dict[str, Any]:
    networks = networks_of(bound)
    if networks is not None:
        return {"type": networks.type, "widths": list(networks.widths)}
    predictor = predicted.predictor_of(bound)
    assert predictor is not None
    said: dict[str, Any] = {"type": predictor.type, "condition": predictor.condition, **lora.describe(bound)}
    if predictor.condition == "image":
        return said | {"pictures": [picture.digest for picture in bound.pictures]}
    return said | {"text": bound.spec.text}


def chain(context: Context, adapters: Sequence[Bound], weights: Sequence[float]) -> tuple[Link, ...]:
    """The hypernetworks of the webui's kind that act in a phase; `weights` has one for each of `adapters`."""
    return tuple(
        Link(bound.version.digest, _load(context, bound), weight)
        for bound, weight in zip(adapters, weights, strict=True)
        if weight and networks_of(bound) is not None
    )


def on_text(links: Sequence[Link], width: int) -> tuple[Link, ...]:
    """Those that change text of this width."""
    return tuple(link for link in links if width in link.net.widths)


@torch.inference_mode()
def change(links: Sequence[Link], states: Tensor) -> tuple[Tensor, Tensor]:
    """Text states `(rows, T, C)` → what keys and what values are read from."""
    keys = values = states
    for link in links:
        keys, values = link.net(keys, values, link.strength)
    return keys, values


def row_contexts(links: Sequence[Link], base: Base) -> RowContexts | None:
    """What the rows carry into self-attention; None if no link acts there."""
    acting = [link for link in links if link.net.widths & base.compatibility.self_attention_widths]
    if not acting:
        return None
    return RowContexts(tuple(link.net for link in acting), torch.tensor([link.strength for link in acting]))


def _load(context: Context, bound: Bound) -> Hypernetwork:
    record, executor = context.record(bound, read_record), context.executor
    assert isinstance(record, dict)
    return context.device.get(
        ("hypernetwork", bound.version.digest),
        parameters_of(record) * executor.dtype.itemsize,
        lambda: Hypernetwork(record).to(executor.device, executor.dtype),
    )


__all__ = [
    "FIELDS",
    "KIND",
    "Link",
    "chain",
    "change",
    "check",
    "check_together",
    "describe",
    "idle",
    "networks_of",
    "on_text",
    "read_record",
    "row_contexts",
]
