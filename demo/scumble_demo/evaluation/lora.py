"""Measures whether a style LoRA draws in its style, and still draws the prompt's concept."""

from __future__ import annotations

from pathlib import Path

from scumble.errors import InvalidRequest
from scumble_demo.emoji.captions import canonical_caption
from scumble_demo.emoji.concepts import Style, style
from scumble_demo.evaluation.measures import concept_rate, style_rate
from scumble_demo.evaluation.trial import ADAPTER, Metrics, Trial, known_prompts, rounded, show, some_concepts
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.serving import served

_END = " style"


def evaluate(base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:  # noqa: ARG001
    """Measure with prompts of known concepts in the trained style, which the base was not trained on.

    The base's recognised concepts are measured in its own styles.
    """
    wanted = some_concepts()
    trained = _style(result)
    trial = Trial(base, tuple(canonical_caption(concept, trained) for concept in wanted))
    with served(base, {ADAPTER: out}) as server:
        without, adapted = trial.plain(server), trial.adapted(server)
        known = Trial(base, known_prompts(wanted)).plain(server)
    show(out, {"without": without, "with": adapted}, trial.prompts)
    return rounded(
        {
            "pictures": len(wanted),
            "style_first": style_rate(scorer, adapted, trained.name),
            "style_first_without": style_rate(scorer, without, trained.name),
            "concept_first": concept_rate(scorer, adapted, wanted),
            "concept_first_of_base": concept_rate(scorer, known, wanted),
        }
    )


def _style(result: Result) -> Style:
    for word in result.trigger_words:
        if word.endswith(_END):
            return style(word.removesuffix(_END))
    raise InvalidRequest(
        '--evaluate needs a style of the bundled data: train with --trigger "NAME style", e.g. "ink style"',
        field="trigger",
    )
