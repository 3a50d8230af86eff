"""Prompts and adapters of one request → what its rows carry. Runs once per request, beside the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

import torch
from torch import Tensor

from scumble.request import Adapter
from scumble_build.layout import Layout
from scumble_registry import Registry
from scumble_server.admission import Admitted, Settings
from scumble_server.base import Base
from scumble_server.batch import factors_of
from scumble_server.methods import lora, textual_inversion
from scumble_server.methods.method import Bound
from scumble_server.prompts import Name, Tokens, tokenize
from scumble_server.residency import Residency
from scumble_server.rows import Conditioning, Phase

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Conditioned:
    """`adapters` are those that were bound, `dropped` those whose prompts have no use for them, and why;
    `cut` holds what the prompts lost to the encoder's length; times are in milliseconds.
    """

    conditioning: Conditioning
    adapters: tuple[Bound, ...]
    dropped: tuple[tuple[Adapter, str], ...]
    cut: dict[str, str]
    load_ms: float
    encode_ms: float


@dataclass(frozen=True, slots=True)
class _Factors:
    """The LoRAs of a request, laid out for each graph that takes factors."""

    text: lora.BoundSet | None
    kv: lora.BoundSet | None
    step: lora.BoundSet | None


class Conditioner:
    """Owns the text encoder and the K/V projection; called from one thread."""

    def __init__(self, base: Base, registry: Registry, residency: Residency) -> None:
        self._base = base
        self._registry = registry
        self._residency = residency

    def condition(self, admitted: Admitted) -> Conditioned:
        start = monotonic()
        loras = [bound for bound in admitted.adapters if bound.kind == lora.KIND]
        embeddings = [bound for bound in admitted.adapters if bound.kind == textual_inversion.KIND]
        prompts = self._tokens(admitted.settings, embeddings)
        found = frozenset[int]().union(*(tokens.found for tokens in prompts.values()))
        factors = self._factors(loras)
        vectors = {index: self._vectors(embeddings[index]) for index in found}
        loaded = monotonic()
        states = self._encode(list(prompts.values()), factors.text, [each.text_weight for each in loras], vectors)
        phases = tuple(
            self._phase(states, factors, _of_loras(weights, admitted)) for weights in admitted.schedule.weights
        )
        encoded = monotonic()
        unused = [bound for index, bound in enumerate(embeddings) if index not in found]
        adapters = tuple(bound for bound in admitted.adapters if not any(bound is each for each in unused))
        return Conditioned(
            Conditioning(phases, admitted.schedule.phase_of_step, frozenset(each.version.digest for each in adapters)),
            adapters,
            tuple((each.spec, textual_inversion.why_unused(each, prompts)) for each in unused),
            {field: tokens.cut for field, tokens in prompts.items() if tokens.cut is not None},
            (loaded - start) * 1e3,
            (encoded - loaded) * 1e3,
        )

    def _tokens(self, settings: Settings, embeddings: Sequence[Bound]) -> dict[str, Tokens]:
        """By field; the negative prompt first, where the request is guided."""
        names = [Name(textual_inversion.token_of(each), textual_inversion.count(each)) for each in embeddings]
        prompts = {"prompt": settings.prompt}
        if settings.guided:
            prompts = {"negative_prompt": settings.negative_prompt, **prompts}
        return {field: tokenize(self._base.tokenizer, text, names) for field, text in prompts.items()}

    def _factors(self, loras: Sequence[Bound]) -> _Factors:
        pieces = [lora.Piece(self._record(each, lora.read_record, lora.nbytes), each.blocks) for each in loras]
        executor = self._base.executor
        return _Factors(
            self._bind("text", executor.text_layout, loras, pieces),
            self._bind("kv", executor.kv_layout, loras, pieces),
            self._bind("step", executor.step_layout, loras, pieces),
        )

    def _vectors(self, bound: Bound) -> Tensor:
        record = self._record(bound, textual_inversion.read_record, textual_inversion.nbytes)
        return textual_inversion.vectors(record, bound.text_weight)

    def _encode(
        self,
        prompts: Sequence[Tokens],
        bound: lora.BoundSet | None,
        text_weights: Sequence[float],
        vectors: Mapping[int, Tensor],
    ) -> Tensor:
        """States `(1, 77, C)`, or `(2, 77, C)` where there is a negative prompt."""
        executor = self._base.executor
        return executor.encode(
            torch.cat([tokens.ids for tokens in prompts]),
            factors_of(lora.row_factors(bound, text_weights), len(prompts), executor.device),
            textual_inversion.overrides(prompts, vectors),
        )

    def _phase(self, states: Tensor, factors: _Factors, weights: Sequence[float]) -> Phase:
        executor = self._base.executor
        kv_factors = factors_of(lora.row_factors(factors.kv, weights), len(states), executor.device)
        return Phase(executor.project(states, kv_factors), lora.row_factors(factors.step, weights))

    def _record(self, bound: Bound, read: Callable[[Path], Record], nbytes: Callable[[Record], int]) -> Record:
        version = bound.version
        return self._residency.get(
            ("record", version.digest), lambda: read(self._registry.record_path(version)), nbytes
        )

    def _bind(
        self, graph: str, layout: Layout, loras: Sequence[Bound], pieces: Sequence[lora.Piece]
    ) -> lora.BoundSet | None:
        key = (graph, *((each.version.digest, each.blocks) for each in loras))
        return self._residency.get(
            key, lambda: lora.bind(layout, pieces), lambda bound: bound.nbytes if bound is not None else 0
        )


def _of_loras(weights: Sequence[float], admitted: Admitted) -> list[float]:
    """Of one phase's weights for all adapters, those of the LoRAs: nothing else follows the steps yet."""
    return [weight for weight, bound in zip(weights, admitted.adapters, strict=True) if bound.kind == lora.KIND]
