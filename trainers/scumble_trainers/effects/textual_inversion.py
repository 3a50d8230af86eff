"""Does the new word draw its thing?"""

from __future__ import annotations

from pathlib import Path

from scumble_trainers.effects.concept import measure_concept, read_taught
from scumble_trainers.effects.trial import ADAPTER, Metrics
from scumble_trainers.parent import Parent
from scumble_trainers.result import Result
from scumble_trainers.scorer import Scorer
from scumble_trainers.serving import served


def evaluate(parent: Parent, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:
    """On held-out pictures of the concept."""
    taught = read_taught(data, result)
    with served(parent, {ADAPTER: out}) as server:
        return measure_concept(parent, taught, out, scorer, server)
