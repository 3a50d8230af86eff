"""The webui's hypernetworks: they change what attention reads its keys and values from.

c + weight · n_k(c) for keys and c + weight · n_v(c) for values, for every attention whose context has a width that the
hypernetwork has networks for, in the order of the request. For cross-attention the context is the text, changed once
per phase; self-attention carries the networks into the step. The texts that ControlNets read and the pictures of
IP-Adapters stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scumble_build.graphs.hypernetwork import Hypernetwork, parameters_of
from scumble_build.graphs.inputs import ContextInputs, StepInputs
from scumble_registry.compatibility import ContextNetworks, HypernetworkCompatibility
from scumble_registry.formats.hypernetwork import read_record
from scumble_server.methods.context import Context
from scumble_server.methods.method import TextChange
from scumble_server.methods.part import BatchRows, Part
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True)
class Link:
    """One hypernetwork of a chain, at its weight in this phase. `digest` is its version's."""

    digest: str
    net: Hypernetwork
    weight: float


def networks_of(adapter: ResolvedAdapter) -> ContextNetworks | None:
    """None for what is no hypernetwork of the webui's kind."""
    compatibility = adapter.version.manifest.compatibility
    if not isinstance(compatibility, HypernetworkCompatibility):
        return None
    return compatibility.network if isinstance(compatibility.network, ContextNetworks) else None


def chain_of(context: Context, weights: Mapping[ResolvedAdapter, float]) -> tuple[Link, ...]:
    """Load the hypernetworks of the webui's kind that act."""
    return tuple(
        Link(adapter.version.digest, _load(context, adapter), weight)
        for adapter, weight in weights.items()
        if weight and networks_of(adapter) is not None
    )


def change_of_text(context: Context, weights: Mapping[ResolvedAdapter, float]) -> TextChange | None:
    """Return how the chain changes the text; None if no hypernetwork that acts has networks for the text's width."""
    width = sum(context.base.compatibility.text_widths)
    links = [link for link in chain_of(context, weights) if width in link.net.widths]

    @torch.inference_mode()
    def apply(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for link in links:
            keys, values = link.net(keys, values, link.weight)
        return keys, values

    return TextChange(tuple((link.digest, link.weight) for link in links), apply) if links else None


def count_attentions(context: Context, adapter: ResolvedAdapter) -> int:
    """Return how many attentions of the UNet read a context of a width that the loaded networks change."""
    widths = _load(context, adapter).widths
    targets = context.base.compatibility.targets
    return sum(shape[1] in widths for name, shape in targets.items() if name.endswith((".attn1.to_k", ".attn2.to_k")))


@dataclass(frozen=True, slots=True, eq=False)
class ContextsPart(Part):
    """Hypernetworks on what self-attention reads, one behind the other; weight `(n,)`."""

    nets: tuple[Hypernetwork, ...]
    weight: Tensor

    @classmethod
    def of(cls, context: Context, weights: Mapping[ResolvedAdapter, float]) -> ContextsPart | None:
        """None if no hypernetwork acts in self-attention."""
        widths = context.base.compatibility.self_attention_widths
        links = [link for link in chain_of(context, weights) if link.net.widths & widths]
        return cls(tuple(link.net for link in links), torch.tensor([link.weight for link in links])) if links else None

    @classmethod
    def stack(cls, parts: Sequence[ContextsPart | None], rows: BatchRows, inputs: StepInputs) -> StepInputs:
        """Images with the same chain, at whatever weights, share its run."""
        chains: dict[tuple[int, ...], list[tuple[Tensor, ContextsPart]]] = {}
        for start, count, part in zip(rows.starts, rows.counts, parts, strict=True):
            if part is not None:
                chains.setdefault(tuple(map(id, part.nets)), []).append((torch.arange(start, start + count), part))
        contexts = (
            ContextInputs(
                torch.cat([places for places, _ in members]).to(rows.device),
                members[0][1].nets,
                torch.cat([part.weight.expand(len(places), -1) for places, part in members]).to(rows.device),
            )
            for members in chains.values()
        )
        return replace(inputs, contexts=tuple(contexts))


def _load(context: Context, adapter: ResolvedAdapter) -> Hypernetwork:
    record, executor = context.record(adapter, read_record), context.executor
    assert isinstance(record, dict)
    return context.device.get(
        ("hypernetwork", adapter.version.digest),
        parameters_of(record) * executor.dtype.itemsize,
        lambda: Hypernetwork(record).to(executor.device, executor.dtype),
    )
