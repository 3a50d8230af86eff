"""Measures a finished run and keeps what was found with it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from scumble.errors import InvalidRequest
from scumble_trainers.card import write_card
from scumble_trainers.effects.trial import Metrics
from scumble_trainers.parent import Parent
from scumble_trainers.result import Result, write_result
from scumble_trainers.scorer import SCORER_FILE, Scorer


def check_measurable(parent: Parent) -> None:
    """Raises InvalidRequest where nothing can judge the pictures."""
    if not (parent.folder / SCORER_FILE).is_file():
        raise InvalidRequest(
            f"--evaluate needs a judge, and {parent.folder} has no {SCORER_FILE}: it is for the demo's base and data; "
            "look at the sample grid and the validation loss instead",
            field="evaluate",
        )


def measure(method: str, parent: Parent, data: Path, out: Path, result: Result) -> Result:
    """The result with the method's effect among its metrics, written to `out` as well."""
    evaluate = import_module(f"scumble_trainers.effects.{method}").evaluate
    effect: Metrics = evaluate(parent, data, out, result, Scorer.load(parent.folder))
    measured = replace(result, metrics={**result.metrics, "effect": effect})
    write_card(out, measured, base=parent.ref)
    write_result(out, measured)
    return measured
