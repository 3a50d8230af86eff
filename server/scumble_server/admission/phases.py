"""Plans the phases of a request: which adapters act at what weight, and which texts are read, in which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class PlannedPhase:
    """A phase before anything is loaded: each adapter's weight, 0 if it does not act, and for each model row the index
    of the text that it reads.
    """

    weights: Mapping[ResolvedAdapter, float]
    texts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The phases of a request. `phase_of_step` has one entry a step."""

    phases: tuple[PlannedPhase, ...]
    phase_of_step: tuple[int, ...]


def plan_phases(adapters: Sequence[ResolvedAdapter], texts_of_step: Sequence[tuple[int, ...]]) -> Schedule:
    """Make one phase of all steps with the same weights and texts. `texts_of_step[i]` has step i's text of each row."""
    steps = len(texts_of_step)
    numbers: dict[tuple[tuple[float, ...], tuple[int, ...]], int] = {}
    phase_of_step = []
    for step, texts in enumerate(texts_of_step):
        weights = tuple(adapter.spec.weight if adapter.spec.is_active(step, steps) else 0.0 for adapter in adapters)
        phase_of_step.append(numbers.setdefault((weights, texts), len(numbers)))
    phases = (PlannedPhase(dict(zip(adapters, weights, strict=True)), texts) for weights, texts in numbers)
    return Schedule(tuple(phases), tuple(phase_of_step))
