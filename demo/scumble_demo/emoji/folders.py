"""Writes folders of captioned pictures for the trainers: `metadata.jsonl` beside PNGs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from scumble.errors import NotFound
from scumble_demo.emoji.captions import captions, plain_caption
from scumble_demo.emoji.concepts import BASE_STYLES, HELD_OUT_STYLES, STYLES, Concept, Style, concepts
from scumble_demo.emoji.gallery import english_names, shared_codes
from scumble_demo.emoji.icons import read_icon_set
from scumble_demo.emoji.render import SIZE, render

Split = Literal["train", "held-out", "all"]

_CALLED = ("{token}, {style}", "a drawing of {token}, {style}", "a picture of {token} in {style}", "{style} {token}")
_VARIATIONS = ((False, 1.0, 0.0, 0.0), (True, 1.0, 0.0, 0.0), (False, 0.85, 0.05, 0.04), (True, 0.85, -0.05, -0.03))
"""Mirroring, size, shift to the right and down."""


@dataclass(frozen=True, slots=True)
class EmojiPicture:
    """A picture with its metadata; `concept` is the same for all pictures of one thing."""

    file_name: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    texts: tuple[str, ...]
    concept: str
    style: str


def write_folder(entries: Iterator[EmojiPicture], out: Path) -> int:
    """Write the pictures and, last, their lines; returns their number."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for entry in entries:
        Image.fromarray(entry.pixels).save(out / entry.file_name)
        line = {"file_name": entry.file_name, "text": entry.texts[0], "texts": entry.texts}
        lines.append(json.dumps(line | {"concept": entry.concept, "style": entry.style}, ensure_ascii=False))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def one_style(modules: Path, style: Style, split: Split, size: int = SIZE) -> Iterator[EmojiPicture]:
    """Yield pictures of one style, split by concept: "train" are those that the base knows."""
    icons = read_icon_set(modules / style.package)
    for concept in concepts():
        if _wanted(concept.held_out, split):
            picture = render(icons.svg_of_code(concept.code), size)
            name = f"{_slug(concept.name)}.png"
            yield EmojiPicture(name, picture, captions(concept, style), concept.name, style.name)


def gallery(
    modules: Path, split: Split, styles: Sequence[Style] = BASE_STYLES, size: int = SIZE
) -> Iterator[EmojiPicture]:
    """Yield all emoji that every set has, about 1,400, in the given styles.

    "held-out" are the concepts that neither the base nor anything else is trained on.
    """
    names, known = english_names(modules), {concept.code: concept for concept in concepts()}
    icon_sets = {style.name: read_icon_set(modules / style.package) for style in styles}
    for code in shared_codes(modules):
        concept = known.get(code)
        if not _wanted(concept is not None and concept.held_out, split):
            continue
        for style in styles:
            picture = render(icon_sets[style.name].svg_of_code(code), size)
            texts = _texts(concept, names.get(code, code), style)
            yield EmojiPicture(
                f"{code}-{style.name}.png", picture, texts, concept.name if concept else code, style.name
            )


def _texts(concept: Concept | None, name: str, style: Style) -> tuple[str, ...]:
    return captions(concept, style) if concept else (plain_caption(name, style),)


def _wanted(held_out: bool, split: Split) -> bool:
    return split == "all" or held_out == (split == "held-out")


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def one_concept(modules: Path, concept: Concept, token: str, split: Split, size: int = SIZE) -> Iterator[EmojiPicture]:
    """Yield a few pictures of one thing, named `token`: "train" in the base's styles, each with small variations;
    "held-out" in the other styles.
    """
    styles = {"train": BASE_STYLES, "held-out": HELD_OUT_STYLES, "all": STYLES}[split]
    for style in styles:
        drawn = Image.fromarray(render(read_icon_set(modules / style.package).svg_of_code(concept.code), size))
        texts = tuple(template.format(token=token, style=style.phrase) for template in _CALLED)
        variations = _VARIATIONS if split == "train" else _VARIATIONS[:1]
        for number, (mirrored, share, right, down) in enumerate(variations):
            picture = np.asarray(_placed(drawn, mirrored, share, right, down))
            yield EmojiPicture(f"{style.name}-{number}.png", picture, texts, concept.name, style.name)


def find_concept(name: str) -> Concept:
    """Return the concept of this name. Raises NotFound, listing the held-out concepts."""
    matches = [concept for concept in concepts() if concept.name == name]
    if not matches:
        unseen = ", ".join(concept.name for concept in concepts() if concept.held_out)
        raise NotFound(f"no concept {name!r}; those that the base was not trained on are {unseen}", name=name)
    return matches[0]


def _placed(drawn: Image.Image, mirrored: bool, share: float, right: float, down: float) -> Image.Image:
    """Return the picture on white, scaled by `share` and shifted by fractions of its side."""
    side = drawn.width
    small = (ImageOps.mirror(drawn) if mirrored else drawn).resize([round(side * share)] * 2, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", drawn.size, "white")
    left, top = ((side - small.width) / 2 + side * shift for shift in (right, down))
    canvas.paste(small, (round(left), round(top)))
    return canvas
