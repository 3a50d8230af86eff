"""Prompts and adapters of one request → what its rows carry. Runs once per request, beside the loop."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor

from scumble_build.layout import Layout
from scumble_registry import Registry
from scumble_registry.formats.lora import LoraRecord, read_record
from scumble_server.admission import Admitted, Bound
from scumble_server.base import Base
from scumble_server.batch import factors_of
from scumble_server.methods import lora
from scumble_server.prompts import tokenize
from scumble_server.residency import Residency
from scumble_server.rows import Conditioning


@dataclass(frozen=True, slots=True)
class Conditioned:
    """`cut` holds what the prompts lost to the encoder's length; times are in milliseconds."""

    conditioning: Conditioning
    ranks: tuple[int, ...]
    cut: dict[str, str]
    load_ms: float
    encode_ms: float


class Conditioner:
    """Owns the text encoder and the K/V projection; called from one thread."""

    def __init__(self, base: Base, registry: Registry, residency: Residency) -> None:
        self._base = base
        self._registry = registry
        self._residency = residency

    def condition(self, admitted: Admitted) -> Conditioned:
        start = monotonic()
        adapters = admitted.adapters
        records = [self._record(each) for each in adapters]
        executor = self._base.executor
        weights = [each.spec.weight for each in adapters]
        text = lora.row_factors(
            self._bind("text", executor.text_layout, adapters, records),
            [each.text_weight for each in adapters],
        )
        kv_factors = lora.row_factors(self._bind("kv", executor.kv_layout, adapters, records), weights)
        step = lora.row_factors(self._bind("step", executor.step_layout, adapters, records), weights)
        loaded = monotonic()
        tokens, cut = self._tokens(admitted)
        states = executor.encode(tokens, factors_of(text, len(tokens), executor.device))
        kv = executor.project(states, factors_of(kv_factors, len(tokens), executor.device))
        encoded = monotonic()
        return Conditioned(
            Conditioning(kv, step, frozenset(each.version.digest for each in adapters)),
            tuple(max(record[name].rank for name in record) for record in records),
            cut,
            (loaded - start) * 1e3,
            (encoded - loaded) * 1e3,
        )

    def _record(self, bound: Bound) -> LoraRecord:
        version = bound.version
        return self._residency.get(
            ("record", version.digest),
            lambda: read_record(self._registry.record_path(version)),
            lambda record: sum(record[name].down.nbytes + record[name].up.nbytes for name in record),
        )

    def _bind(
        self, graph: str, layout: Layout, adapters: tuple[Bound, ...], records: list[LoraRecord]
    ) -> lora.BoundSet | None:
        key = (graph, *(each.version.digest for each in adapters))
        return self._residency.get(
            key, lambda: lora.bind(layout, records), lambda bound: bound.nbytes if bound is not None else 0
        )

    def _tokens(self, admitted: Admitted) -> tuple[Tensor, dict[str, str]]:
        """ids `(1, 77)`, or `(2, 77)` with the negative prompt first where the request is guided."""
        settings = admitted.settings
        prompts = {"prompt": settings.prompt}
        if settings.guided:
            prompts = {"negative_prompt": settings.negative_prompt, **prompts}
        tokens = {field: tokenize(self._base.tokenizer, text) for field, text in prompts.items()}
        cut = {field: each.cut for field, each in tokens.items() if each.cut is not None}
        return torch.cat([each.ids for each in tokens.values()]), cut
