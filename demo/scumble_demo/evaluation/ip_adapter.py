"""Measures whether images resemble the reference, more at a higher scale, and still follow the prompt."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from scumble.request import Adapter
from scumble_demo.emoji.concepts import BASE_STYLES
from scumble_demo.evaluation.measures import concept_rate, first_rate
from scumble_demo.evaluation.trial import ADAPTER, COUNT, Metrics, Trial, known_prompts, rounded, show, some_concepts
from scumble_demo.evaluation.unseen import unseen_drawings, unseen_pictures
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase
from scumble_trainers.results.serving import Served, served

SCALES = (0.0, 0.5, 1.0)


def evaluate(base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:  # noqa: ARG001
    """Measure with references of known things in a held-out style, and of things that neither base nor adapter saw.

    Prompts name only a style, or (at half the scale) another thing, which must still be drawn.
    """
    drawings, things = unseen_drawings(COUNT), unseen_pictures(COUNT)
    says_nothing = Trial(base, tuple(f"an emoji, {BASE_STYLES[i % 3].phrase}" for i in range(COUNT)))
    others = some_concepts()
    says_else = Trial(base, known_prompts(others))
    with served(base, {ADAPTER: out}) as server:
        drawn = {scale: _draw(says_nothing, server, drawings, scale) for scale in SCALES}
        unseen = {scale: _draw(says_nothing, server, things, scale) for scale in SCALES}
        decided = _draw(says_else, server, drawings, 0.5)
        alone = says_else.plain(server)
    columns = {"reference": drawings} | {f"scale {scale:g}": drawn[scale] for scale in SCALES}
    show(out, columns | {"0.5 and text": decided}, says_else.prompts)
    first = {f"reference_first_at_{scale:g}": first_rate(scorer, drawn[scale], drawings) for scale in SCALES}
    rates = {f"unseen_thing_first_at_{scale:g}": first_rate(scorer, unseen[scale], things) for scale in SCALES}
    return rounded(
        {
            "pictures": COUNT,
            **first,
            **rates,
            "concept_of_text_at_0.5": concept_rate(scorer, decided, others),
            "concept_of_text_without": concept_rate(scorer, alone, others),
        }
    )


def _draw(trial: Trial, server: Served, references: list[Image.Image], scale: float) -> list[Image.Image]:
    images = {str(index): png(reference) for index, reference in enumerate(references)}
    adapters = [Adapter(ref=ADAPTER, weight=scale, images=(name,)) for name in images]
    return trial.draw(server, adapters, images=images)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
