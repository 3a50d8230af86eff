"""Does a picture show in what is drawn, more at a higher scale, and does the text still decide?"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from scumble.request import Adapter
from scumble_trainers.effects.measures import concept_rate, first_rate
from scumble_trainers.effects.trial import ADAPTER, COUNT, Metrics, Trial, known_prompts, rounded, show, some_concepts
from scumble_trainers.effects.unseen import unseen_pictures
from scumble_trainers.emoji.concepts import BASE_STYLES
from scumble_trainers.parent import Parent
from scumble_trainers.result import Result
from scumble_trainers.scorer import Scorer
from scumble_trainers.serving import Served, served

SCALES = (0.0, 0.5, 1.0)


def evaluate(parent: Parent, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:  # noqa: ARG001
    """References are concepts that neither base nor adapter saw; prompts say nothing but a style, or something else."""
    references = unseen_pictures(COUNT)
    says_nothing = Trial(parent, tuple(f"an emoji, {BASE_STYLES[i % 3].phrase}" for i in range(COUNT)))
    others = some_concepts()
    says_else = Trial(parent, known_prompts(others))
    with served(parent, {ADAPTER: out}) as server:
        drawn = {scale: _draw(says_nothing, server, references, scale) for scale in SCALES}
        decided = _draw(says_else, server, references, 0.5)
        alone = says_else.plain(server)
    columns = {"reference": references} | {f"scale {scale:g}": drawn[scale] for scale in SCALES}
    show(out, columns | {"0.5 and text": decided}, says_else.prompts)
    first = {f"reference_first_at_{scale:g}": first_rate(scorer, drawn[scale], references) for scale in SCALES}
    return rounded(
        {
            "pictures": COUNT,
            **first,
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
