from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scumble.errors import NotFound
from scumble_demo.emoji.icons import read_icon_set
from scumble_demo.emoji.render import contact_sheet, render

DISC = '<circle cx="8" cy="8" r="6" fill="#f00"/>'


def icon_set(folder: Path) -> Path:
    icons = {
        "icons": {"disc": {"body": DISC}, "wide": {"body": DISC, "width": 32}},
        "aliases": {"circle": {"parent": "disc"}},
        "width": 16,
        "height": 16,
    }
    (folder / "icons.json").write_text(json.dumps(icons))
    (folder / "chars.json").write_text(json.dumps({"1f534": "disc", "26aa-fe0f": "circle"}))
    return folder


def test_a_picture_is_drawn_on_white(tmp_path: Path) -> None:
    pixels = render(read_icon_set(icon_set(tmp_path)).svg("disc"), 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[16, 16].tolist() == [255, 0, 0]


def test_a_wide_picture_keeps_its_proportions(tmp_path: Path) -> None:
    pixels = render(read_icon_set(icon_set(tmp_path)).svg("wide"), 32)
    red = (pixels == [255, 0, 0]).all(axis=2)
    height, width = np.ptp(np.nonzero(red), axis=1)
    assert abs(int(height) - int(width)) <= 1
    assert pixels[0].min() == 255


def test_codes_lead_to_icons_through_aliases_and_variation_selectors(tmp_path: Path) -> None:
    icons = read_icon_set(icon_set(tmp_path))
    assert icons.svg_of_code("26aa") == icons.svg("disc")
    with pytest.raises(NotFound):
        icons.svg_of_code("1f600")


def test_a_contact_sheet_has_a_place_for_each_picture() -> None:
    sheet = contact_sheet(np.zeros((5, 8, 8, 3), np.uint8), columns=3, gap=2)
    assert sheet.size == (28, 18)
