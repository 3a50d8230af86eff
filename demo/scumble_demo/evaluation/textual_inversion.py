"""Measures whether a new word draws its concept."""

from __future__ import annotations

from pathlib import Path

from scumble_demo.evaluation.concept import measure_concept, read_taught
from scumble_demo.evaluation.trial import ADAPTER, Metrics
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.serving import served


def evaluate(base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:
    """Measure on held-out pictures of the concept."""
    taught = read_taught(data, result)
    with served(base, {ADAPTER: out}) as server:
        return measure_concept(base, taught, out, scorer, server)
