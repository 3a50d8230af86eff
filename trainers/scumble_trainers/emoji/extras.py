"""The concepts as other hands drew them: pictures that only the scorer learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scumble_trainers.emoji.concepts import EXTRA_STYLES, STYLES, concepts
from scumble_trainers.emoji.icons import IconSet, read_icon_set
from scumble_trainers.emoji.render import render


@dataclass(frozen=True, slots=True)
class Extras:
    """`pictures (n, H, W, 3)` and the number of the concept that each shows, `rows (n,)`."""

    pictures: NDArray[np.uint8]
    rows: NDArray[np.int64]


def render_extras(modules: Path) -> Extras:
    """These packages have no table of code points; their icons are found by the names the other sets use."""
    named = [read_icon_set(modules / style.package) for style in STYLES]
    pictures, rows = [], []
    for style in EXTRA_STYLES:
        icons = read_icon_set(modules / style.package)
        for row, concept in enumerate(concepts()):
            svg = _first_svg(icons, [icon_set.codes.get(concept.code) for icon_set in named])
            if svg is not None:
                pictures.append(render(svg))
                rows.append(row)
    return Extras(np.stack(pictures), np.array(rows))


def _first_svg(icons: IconSet, names: list[str | None]) -> str | None:
    for name in names:
        if name is not None and (name in icons.icons or name in icons.aliases):
            return icons.svg(name)
    return None


def save_extras(extras: Extras, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "extras.npz", pictures=extras.pictures, rows=extras.rows)


def load_extras(folder: Path) -> Extras | None:
    """What `save_extras` wrote; None where it is not there."""
    path = folder / "extras.npz"
    if not path.is_file():
        return None
    with np.load(path) as kept:
        return Extras(kept["pictures"], kept["rows"])
