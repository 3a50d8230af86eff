"""Measures a finished run and stores the figures with its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from scumble.errors import InvalidRequest
from scumble_demo.evaluation import controlnet, dreambooth, hypernetwork, ip_adapter, lora, textual_inversion
from scumble_demo.evaluation.trial import Metrics
from scumble_demo.scorer import SCORER_FILE, Scorer
from scumble_registry.results import Result, write_result
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.card import write_card


class Evaluate(Protocol):
    """Draws with the adapter in `out` and measures its effect."""

    def __call__(self, base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics: ...


EVALUATIONS: Mapping[str, Evaluate] = {
    "lora": lora.evaluate,
    "textual_inversion": textual_inversion.evaluate,
    "hypernetwork": hypernetwork.evaluate,
    "ip_adapter": ip_adapter.evaluate,
    "controlnet": controlnet.evaluate,
    "dreambooth": dreambooth.evaluate,
}
"""Evaluations by name of the method."""


def check_measurable(base: TrainingBase) -> None:
    """Check that the base has a scorer. Raises InvalidRequest otherwise."""
    if not (base.folder / SCORER_FILE).is_file():
        raise InvalidRequest(
            f"--evaluate needs a scorer, and {base.folder} has no {SCORER_FILE}: it is for the demo's base and data; "
            "use the sample grid and the validation loss instead",
            field="evaluate",
        )


def measure(method: str, base: TrainingBase, data: Path, out: Path, result: Result) -> Result:
    """Measure the effect, write it to `out`, and return the result with it among the metrics."""
    effect = EVALUATIONS[method](base, data, out, result, Scorer.load(base.folder))
    measured = replace(result, metrics={**result.metrics, "effect": effect})
    write_card(out, measured, base=base.ref)
    write_result(out, measured)
    return measured
