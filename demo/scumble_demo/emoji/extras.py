"""The concepts in more styles: pictures that only the scorer is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scumble_demo.emoji.concepts import EXTRA_STYLES, STYLES, Concept, Style, concepts
from scumble_demo.emoji.icons import IconSet, read_icon_set
from scumble_demo.emoji.render import render


@dataclass(frozen=True, slots=True)
class Extras:
    """`pictures (n, H, W, 3)` and the index of each one's concept, `rows (n,)`."""

    pictures: NDArray[np.uint8]
    rows: NDArray[np.int64]


def render_extras(modules: Path) -> Extras:
    """Render the extra pictures. These packages have no code points; icons are found by the names of the other sets."""
    drawn = [extra_pictures(modules, concept) for concept in concepts()]
    rows = [row for row, pictures in enumerate(drawn) for _ in pictures]
    return Extras(np.stack([picture for pictures in drawn for picture in pictures]), np.array(rows))


def extra_pictures(modules: Path, concept: Concept, styles: Sequence[Style] = EXTRA_STYLES) -> list[NDArray[np.uint8]]:
    """Return one concept in every extra style that has it."""
    named = [_icons(modules / style.package) for style in STYLES]
    svgs = [
        _first_svg(_icons(modules / style.package), [icons.codes.get(concept.code) for icons in named])
        for style in styles
    ]
    return [render(svg) for svg in svgs if svg is not None]


@cache
def _icons(package: Path) -> IconSet:
    return read_icon_set(package)


def _first_svg(icons: IconSet, names: list[str | None]) -> str | None:
    for name in names:
        if name is not None and (name in icons.icons or name in icons.aliases):
            return icons.svg(name)
    return None


def save_extras(extras: Extras, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "extras.npz", pictures=extras.pictures, rows=extras.rows)


def load_extras(folder: Path) -> Extras | None:
    """Read what `save_extras` wrote; None if it does not exist."""
    path = folder / "extras.npz"
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return Extras(stored["pictures"], stored["rows"])
