"""Measures whether a checkpoint draws its concept, and still draws others."""

from __future__ import annotations

from pathlib import Path

from scumble_demo.evaluation.concept import measure_concept, read_taught
from scumble_demo.evaluation.measures import concept_rate
from scumble_demo.evaluation.trial import ADAPTER, Metrics, Trial, known_prompts, rounded, some_concepts
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.serving import served


def evaluate(base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:
    """Measure on held-out pictures of the concept, and on other concepts that the base knows."""
    taught = read_taught(data, result)
    others = [concept for concept in some_concepts() if concept != taught.concept]
    prior = Trial(base, known_prompts(others))
    with served(base, {ADAPTER: out}) as server:
        metrics = measure_concept(base, taught, out, scorer, server)
        before, after = (concept_rate(scorer, drawn, others) for drawn in (prior.plain(server), prior.adapted(server)))
    return metrics | rounded({"prior_concept_first_without": before, "prior_concept_first": after})
