"""Folders of captioned pictures, the form that trainers read: `metadata.jsonl` beside the PNGs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scumble_trainers.emoji.captions import captions, plain_caption
from scumble_trainers.emoji.concepts import BASE_STYLES, Concept, Style, concepts
from scumble_trainers.emoji.gallery import english_names, shared_codes
from scumble_trainers.emoji.icons import read_icon_set
from scumble_trainers.emoji.render import SIZE, render

Split = Literal["train", "held-out", "all"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture; `concept` is the same for all pictures of one thing."""

    file_name: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    texts: tuple[str, ...]
    concept: str
    style: str


def write_folder(entries: Iterator[Entry], out: Path) -> int:
    """Writes the pictures and, last, their lines; returns how many there are."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for entry in entries:
        Image.fromarray(entry.pixels).save(out / entry.file_name)
        line = {"file_name": entry.file_name, "text": entry.texts[0], "texts": entry.texts}
        lines.append(json.dumps(line | {"concept": entry.concept, "style": entry.style}, ensure_ascii=False))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def one_style(modules: Path, style: Style, split: Split, size: int = SIZE) -> Iterator[Entry]:
    """The known concepts as one hand drew them. By concept: "train" are those that the base knows."""
    icons = read_icon_set(modules / style.package)
    for concept in concepts():
        if _wanted(concept.held_out, split):
            picture = render(icons.svg_of_code(concept.code), size)
            name = f"{_slug(concept.name)}.png"
            yield Entry(name, picture, captions(concept, style), concept.name, style.name)


def gallery(modules: Path, split: Split, styles: Sequence[Style] = BASE_STYLES, size: int = SIZE) -> Iterator[Entry]:
    """All emoji that every set has, about 1,400, as the given hands drew them.

    "held-out" are the concepts that the base never saw and that nothing else may learn from either.
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
            yield Entry(f"{code}-{style.name}.png", picture, texts, concept.name if concept else code, style.name)


def _texts(concept: Concept | None, name: str, style: Style) -> tuple[str, ...]:
    return captions(concept, style) if concept else (plain_caption(name, style),)


def _wanted(held_out: bool, split: Split) -> bool:
    return split == "all" or held_out == (split == "held-out")


def _slug(name: str) -> str:
    return name.replace(" ", "-")
