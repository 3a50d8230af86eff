"""Hypernetworks, of two kinds.

One that predicts a LoRA from a picture or a text (`predictor.py`) is from there a LoRA. One of the webui's kind changes
what attention reads its keys and values from (`context_networks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter
from scumble_registry.formats.hypernetwork import KIND, read_record
from scumble_server.base import Base
from scumble_server.methods.context import Context, Text
from scumble_server.methods.hypernetwork import predictor
from scumble_server.methods.hypernetwork.context_networks import (
    ContextsPart,
    change_of_text,
    count_attentions,
    networks_of,
)
from scumble_server.methods.lora import check_targets, describe_lora, why_idle
from scumble_server.methods.method import Lora, Method, TextChange
from scumble_server.request.adapter import ResolvedAdapter

_OF_PREDICTORS = ("blocks", "images", "text", "text_weight")
"""Fields that a hypernetwork of the webui's kind does not read."""


class HypernetworkMethod(Method):
    kind = KIND
    fields = frozenset({"start", "end", *_OF_PREDICTORS})

    def read_record(self, path: Path) -> Any:
        return read_record(path)

    def check(self, adapter: ResolvedAdapter, base: Base) -> None:
        lora, network = self.lora(adapter), predictor.predictor_of(adapter)
        if lora is not None and network is not None:
            predictor.check(adapter, network, base)
            check_targets(lora, base)
        else:
            _check_context_networks(adapter, base)

    def idle(self, adapter: ResolvedAdapter, steps: int) -> str | None:
        lora = self.lora(adapter)
        return adapter.why_never(steps) if lora is None else why_idle(lora, steps)

    def lora(self, adapter: ResolvedAdapter) -> Lora | None:
        network = predictor.predictor_of(adapter)
        return None if network is None else predictor.predicted_lora(adapter, network)

    def text_change(self, context: Context, weights: Mapping[ResolvedAdapter, float]) -> TextChange | None:
        return change_of_text(context, weights)

    def carry(self, context: Context, weights: Mapping[ResolvedAdapter, float], text: Text) -> ContextsPart | None:  # noqa: ARG002
        return ContextsPart.of(context, weights)

    def layers(self, context: Context, adapter: ResolvedAdapter) -> int | None:
        """The attentions whose context the loaded networks change; a predicted LoRA's are counted as a LoRA's."""
        return None if networks_of(adapter) is None else count_attentions(context, adapter)

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:
        networks = networks_of(adapter)
        if networks is not None:
            return {"type": networks.type, "widths": list(networks.widths)}
        lora, network = self.lora(adapter), predictor.predictor_of(adapter)
        assert lora is not None and network is not None
        entry: dict[str, Any] = {"type": network.type, "condition": network.condition, **describe_lora(lora)}
        if network.condition == "image":
            return entry | {"pictures": [picture.digest for picture in adapter.pictures]}
        return entry | {"text": adapter.spec.text}


def _check_context_networks(adapter: ResolvedAdapter, base: Base) -> None:
    """Raises InvalidRequest for a field that this kind does not read, Refused where graphs are fixed."""
    for name in _OF_PREDICTORS:
        if getattr(adapter.spec, name) != Adapter.model_fields[name].default:
            raise InvalidRequest(
                f"{adapter.spec.ref} is a hypernetwork on attention's context, for which {name} means nothing; "
                "leave it out",
                field=f"adapters.{name}",
            )
    networks = networks_of(adapter)
    assert networks is not None
    if not base.changes_graphs and set(networks.widths) & base.compatibility.self_attention_widths:
        raise Refused(
            f"{adapter.spec.ref} is a hypernetwork on self-attention, which changes the graph, and this server's "
            "graphs are fixed; ask a server that runs with --executor torch",
            ref=adapter.spec.ref,
        )
