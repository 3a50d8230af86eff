"""Measures whether a trained word draws its concept, compared with pictures in held-out styles."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scumble.errors import InvalidRequest
from scumble_demo.emoji.captions import with_article
from scumble_demo.emoji.concepts import BASE_STYLES, Concept
from scumble_demo.emoji.extras import extra_pictures
from scumble_demo.emoji.folders import find_concept, one_concept
from scumble_demo.emoji.home import data_home
from scumble_demo.emoji.packages import fetch_packages
from scumble_demo.evaluation.measures import concept_rate, similarity
from scumble_demo.evaluation.trial import ADAPTER, COUNT, Metrics, Trial, rounded, show
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase
from scumble_trainers.data.sidecars import METADATA
from scumble_trainers.results.serving import Served

_SAID = ("{thing}, {style}", "a drawing of {thing}, {style}", "a picture of {thing} in {style}")


@dataclass(frozen=True, slots=True)
class Taught:
    """A concept, its word, and pictures of it in other styles."""

    concept: Concept
    token: str
    references: list[Image.Image]


def measure_concept(base: TrainingBase, taught: Taught, out: Path, scorer: Scorer, server: Served) -> Metrics:
    """Measure images of the word, and of the concept's kind ("a bird") by the base."""
    named = Trial(base, _prompts(taught.token))
    kind = Trial(base, _prompts(with_article(taught.concept.kind)))
    without, adapted = kind.plain(server), named.adapted(server)
    show(out, {f"{taught.concept.kind}, base": without, taught.token: adapted}, named.prompts)
    before, after = (similarity(scorer, drawn, taught.references) for drawn in (without, adapted))
    return rounded(
        {
            "pictures": COUNT,
            "similarity_without": before,
            "similarity": after,
            "similarity_gain": after - before,
            "concept_first_without": concept_rate(scorer, without, [taught.concept] * COUNT),
            "concept_first": concept_rate(scorer, adapted, [taught.concept] * COUNT),
        }
    )


def read_taught(data: Path, result: Result) -> Taught:
    """Read the folder that `scumble train emoji --concept` wrote, and render pictures in other styles."""
    lines = (data / METADATA if data.is_dir() else data).read_text("utf-8").splitlines()
    names = {json.loads(line).get("concept") for line in lines if line.strip()}
    if len(names) != 1 or None in names or not result.trigger_words:
        raise InvalidRequest(
            "--evaluate needs one concept of the bundled data (`scumble train emoji --concept NAME`), "
            "with its word as --trigger",
            field="data",
        )
    concept, token = find_concept(str(names.pop())), result.trigger_words[0]
    return Taught(concept, token, other_hands(concept, token))


def other_hands(concept: Concept, token: str = "") -> list[Image.Image]:
    """Return a concept in every style that is not the base's."""
    modules = fetch_packages(data_home() / "npm")
    held_out = [Image.fromarray(entry.pixels) for entry in one_concept(modules, concept, token, "held-out")]
    return held_out + [Image.fromarray(pixels) for pixels in extra_pictures(modules, concept)]


def _prompts(thing: str) -> tuple[str, ...]:
    """Return prompts for all pairs of wording and style, in turn."""
    pairs = [(said, style) for style in BASE_STYLES for said in _SAID]
    return tuple(
        said.format(thing=thing, style=style.phrase)
        for said, style in (pairs[index % len(pairs)] for index in range(COUNT))
    )


__all__ = ["ADAPTER", "Taught", "measure_concept", "other_hands", "read_taught"]
