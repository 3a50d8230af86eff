"""`--evaluate`: measures what a trained adapter does, where a package that can judge pictures is installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

from scumble.errors import Unavailable
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.result import Result

GROUP = "scumble.evaluation"
"""Entry point: a module that is an `Evaluator`."""


class Evaluator(Protocol):
    """Judges the pictures that a trained adapter draws."""

    def check_measurable(self, base: TrainingBase) -> None:
        """Raises InvalidRequest for a base whose pictures it cannot judge."""

    def measure(self, method: str, base: TrainingBase, data: Path, out: Path, result: Result) -> Result:
        """Returns `result` with the effect among its metrics, and writes it to `out`."""


def installed_evaluation() -> Evaluator:
    """Raises Unavailable where none is installed."""
    entries = list(entry_points(group=GROUP))
    if not entries:
        raise Unavailable("--evaluate needs a judge of pictures, and none is installed: pip install 'scumble[demo]'")
    return cast("Evaluator", entries[0].load())
