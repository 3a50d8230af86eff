"""The gallery: every icon that all styles have, rendered once and stored as one array on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scumble_demo.emoji.concepts import STYLES, concepts
from scumble_demo.emoji.icons import read_icon_set
from scumble_demo.emoji.packages import NAMES_PACKAGE
from scumble_demo.emoji.render import SIZE, render

_MODIFIERS = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}  # skin tones
_LETTERS = {f"{code:x}" for code in range(0x1F1E6, 0x1F200)}  # the letters that flags are spelt with


@dataclass(frozen=True, slots=True)
class Gallery:
    """`pictures (codes, styles, H, W, 3)`, uint8; `codes` starts with the concepts' in their order."""

    pictures: NDArray[np.uint8]
    codes: tuple[str, ...]
    names: tuple[str, ...]


def english_names(modules: Path) -> dict[str, str]:
    """Return the English names of all emoji by code point in hex."""
    text = (modules / NAMES_PACKAGE / "data-by-emoji.json").read_text(encoding="utf-8")
    return {
        "-".join(f"{ord(c):x}" for c in emoji if c != "\ufe0f"): str(row["name"])
        for emoji, row in json.loads(text).items()
    }


def shared_codes(modules: Path) -> tuple[str, ...]:
    """Return the concepts' codes, then those of all other emoji that every style has."""
    first = [concept.code for concept in concepts()]
    drawn = [set(read_icon_set(modules / style.package).codes) for style in STYLES]
    others = set(english_names(modules)).intersection(*drawn) - set(first)
    return (*first, *sorted(code for code in others if not _is_letter_or_tone(code)))


def _is_letter_or_tone(code: str) -> bool:
    return any(part in _MODIFIERS or part in _LETTERS for part in code.split("-"))


def render_gallery(modules: Path, progress: Callable[[int, int], None] | None = None) -> Gallery:
    """Render everything at 128 px: about 7,000 pictures in half a minute."""
    codes, names = shared_codes(modules), english_names(modules)
    pictures = np.empty((len(codes), len(STYLES), SIZE, SIZE, 3), np.uint8)
    for column, style in enumerate(STYLES):
        icons = read_icon_set(modules / style.package)
        for row, code in enumerate(codes):
            pictures[row, column] = render(icons.svg_of_code(code))
        if progress:
            progress(column + 1, len(STYLES))
    return Gallery(pictures, codes, tuple(names.get(code, code) for code in codes))


def save_gallery(gallery: Gallery, folder: Path) -> None:
    """Write `pictures.npy`, then `codes.json`, which marks the first as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", gallery.pictures)
    rows = list(zip(gallery.codes, gallery.names, strict=True))
    (folder / "codes.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def load_gallery(folder: Path) -> Gallery | None:
    """Map what `save_gallery` wrote from disk; None if it does not exist."""
    if not (folder / "codes.json").is_file():
        return None
    rows = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    pictures = np.load(folder / "pictures.npy", mmap_mode="r")
    return Gallery(pictures, tuple(r[0] for r in rows), tuple(r[1] for r in rows))
