"""One room per adapter method, which holds all that is its own; a new method is a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from scumble.events import Pixels
from scumble_server.methods.context import Context
from scumble_server.methods.controlnet import ControlNetMethod
from scumble_server.methods.dreambooth import DreamboothMethod
from scumble_server.methods.hypernetwork import HypernetworkMethod
from scumble_server.methods.ip_adapter import IpAdapterMethod
from scumble_server.methods.lora import LoraMethod
from scumble_server.methods.method import Lora, Method
from scumble_server.methods.textual_inversion import TextualInversionMethod
from scumble_server.prompts.tokens import PromptWord
from scumble_server.request.adapter import ResolvedAdapter

METHODS: dict[str, Method] = {
    method.kind: method
    for method in (
        LoraMethod(),
        TextualInversionMethod(),
        IpAdapterMethod(),
        ControlNetMethod(),
        HypernetworkMethod(),
        DreamboothMethod(),
    )
}
"""By the kind that the registry gives."""


def method_of(adapter: ResolvedAdapter) -> Method:
    return METHODS[adapter.kind]


def words_of(adapters: Iterable[ResolvedAdapter]) -> dict[ResolvedAdapter, PromptWord]:
    """The words that stand for adapters in a prompt."""
    words = ((adapter, method_of(adapter).word(adapter)) for adapter in adapters)
    return {adapter: word for adapter, word in words if word is not None}


def loras_of(adapters: Iterable[ResolvedAdapter]) -> list[Lora]:
    """The LoRAs that adapters are, bring along or predict."""
    loras = (method_of(adapter).lora(adapter) for adapter in adapters)
    return [lora for lora in loras if lora is not None]


def scheduler_config_of(adapters: Iterable[ResolvedAdapter], default: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scheduler's config that an adapter brings, or else the base's."""
    configs = (method_of(adapter).scheduler_config(adapter) for adapter in adapters)
    return next((config for config in configs if config is not None), default)


def control_maps_of(context: Context, adapters: Iterable[ResolvedAdapter]) -> tuple[Pixels, ...]:
    """The control maps that are made here of adapters' pictures, in the order of adapters and their images."""
    maps = (method_of(adapter).control_maps(context, adapter) for adapter in adapters)
    return tuple(pixels for of_adapter in maps for pixels in of_adapter)


def by_method(weights: Mapping[ResolvedAdapter, float]) -> list[tuple[Method, dict[ResolvedAdapter, float]]]:
    """The weights of a phase, method by method; methods without an adapter are left out."""
    grouped = (
        (method, {adapter: weight for adapter, weight in weights.items() if adapter.kind == kind})
        for kind, method in METHODS.items()
    )
    return [(method, own) for method, own in grouped if own]


__all__ = [
    "METHODS",
    "Lora",
    "Method",
    "by_method",
    "control_maps_of",
    "loras_of",
    "method_of",
    "scheduler_config_of",
    "words_of",
]
