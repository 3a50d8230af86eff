"""`--evaluate`: measures a trained adapter's effect, if a package with an evaluator is installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

from scumble.errors import Unavailable
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase

GROUP = "scumble.evaluation"
"""Entry point for a module that implements `Evaluator`."""


class Evaluator(Protocol):
    """Measures the images drawn with a trained adapter."""

    def check_measurable(self, base: TrainingBase) -> None:
        """Check a base. Raises InvalidRequest if its images cannot be measured."""

    def measure(self, method: str, base: TrainingBase, data: Path, out: Path, result: Result) -> Result:
        """Measure the effect, write it to `out`, and return `result` with it among the metrics."""


def installed_evaluation() -> Evaluator:
    """Load the evaluator. Raises Unavailable if none is installed."""
    entries = list(entry_points(group=GROUP))
    if not entries:
        raise Unavailable("--evaluate needs an evaluator, and none is installed: run pip install 'scumble[demo]'")
    return cast("Evaluator", entries[0].load())
