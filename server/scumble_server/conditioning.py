"""Prompts and adapters of one request → what its rows carry. Runs once per request, beside the loop."""

from __future__ import annotations

from collections.abc import Sequence
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
from scumble_server.rows import Conditioning, Phase


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
        pieces = [lora.Piece(self._record(each), each.blocks) for each in adapters]
        executor = self._base.executor
        text, kv, step = (
            self._bind(name, layout, adapters, pieces)
            for name, layout in (
                ("text", executor.text_layout),
                ("kv", executor.kv_layout),
                ("step", executor.step_layout),
            )
        )
        loaded = monotonic()
        tokens, cut = self._tokens(admitted)
        text_factors = lora.row_factors(text, [each.text_weight for each in adapters])
        states = executor.encode(tokens, factors_of(text_factors, len(tokens), executor.device))
        phases = tuple(self._phase(states, kv, step, weights) for weights in admitted.schedule.weights)
        encoded = monotonic()
        return Conditioned(
            Conditioning(phases, admitted.schedule.phase_of_step, frozenset(each.version.digest for each in adapters)),
            tuple(max(module.rank for module in piece.record.values()) for piece in pieces),
            cut,
            (loaded - start) * 1e3,
            (encoded - loaded) * 1e3,
        )

    def _phase(
        self, states: Tensor, kv: lora.BoundSet | None, step: lora.BoundSet | None, weights: Sequence[float]
    ) -> Phase:
        executor = self._base.executor
        kv_factors = factors_of(lora.row_factors(kv, weights), len(states), executor.device)
        return Phase(executor.project(states, kv_factors), lora.row_factors(step, weights))

    def _record(self, bound: Bound) -> LoraRecord:
        version = bound.version
        return self._residency.get(
            ("record", version.digest),
            lambda: read_record(self._registry.record_path(version)),
            lambda record: sum(record[name].down.nbytes + record[name].up.nbytes for name in record),
        )

    def _bind(
        self, graph: str, layout: Layout, adapters: tuple[Bound, ...], pieces: list[lora.Piece]
    ) -> lora.BoundSet | None:
        key = (graph, *((each.version.digest, each.blocks) for each in adapters))
        return self._residency.get(
            key, lambda: lora.bind(layout, pieces), lambda bound: bound.nbytes if bound is not None else 0
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
