"""Does the new word draw its thing?"""

from __future__ import annotations

from pathlib import Path

from scumble_demo.evaluation.concept import measure_concept, read_taught
from scumble_demo.evaluation.trial import ADAPTER, Metrics
from scumble_demo.scorer import Scorer
from scumble_trainers.parent import Parent
from scumble_trainers.results.result import Result
from scumble_trainers.results.serving import served


def evaluate(parent: Parent, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:
    """On held-out pictures of the concept."""
    taught = read_taught(data, result)
    with served(parent, {ADAPTER: out}) as server:
        return measure_concept(parent, taught, out, scorer, server)
