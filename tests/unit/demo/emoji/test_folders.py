"""Folders of pictures, from packages of plain discs in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.errors import NotFound
from scumble_demo.emoji.concepts import BASE_STYLES, HELD_OUT_STYLES, STYLES, concepts, style
from scumble_demo.emoji.folders import find_concept, gallery, one_concept, one_style, write_folder
from scumble_demo.emoji.packages import NAMES_PACKAGE
from scumble_trainers.data.dataset import read_examples

FURTHER = "1f680-1f681"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every style draws every concept, and one thing more, as a half disc of its own colour."""
    folder = tmp_path_factory.mktemp("node_modules")
    codes = [concept.code for concept in concepts()] + [FURTHER]
    for number, each in enumerate(STYLES):
        package = folder / each.package
        package.mkdir(parents=True)
        body = f'<path d="M0 0h8v16h-8z" fill="#{number + 1}00"/>'
        icons = {"icons": {code: {"body": body} for code in codes}, "width": 16, "height": 16}
        (package / "icons.json").write_text(json.dumps(icons), "utf-8")
        (package / "chars.json").write_text(json.dumps({code: code for code in codes}), "utf-8")
    names = folder / NAMES_PACKAGE
    names.mkdir(parents=True)
    emoji = "".join(chr(int(part, 16)) for part in FURTHER.split("-"))
    (names / "data-by-emoji.json").write_text(json.dumps({emoji: {"name": "odd thing"}}), "utf-8")
    return folder


def test_a_style_is_the_concepts_that_the_base_knows(modules: Path) -> None:
    entries = list(one_style(modules, style("ink"), "train", 16))
    assert len(entries) == sum(not concept.held_out for concept in concepts())
    assert all("ink style" in text for text in entries[0].texts)


def test_the_gallery_has_everything_but_what_is_held_out(modules: Path) -> None:
    held_out = {concept.name for concept in concepts() if concept.held_out}
    shown = list(gallery(modules, "train", size=16))
    assert {entry.concept for entry in shown} == {c.name for c in concepts() if not c.held_out} | {FURTHER}
    assert {entry.style for entry in shown} == {each.name for each in BASE_STYLES}
    assert any("odd thing" in entry.texts[0] for entry in shown)
    assert {entry.concept for entry in gallery(modules, "held-out", size=16)} == held_out


def test_one_thing_a_few_times_a_little_differently_and_by_hands_never_shown(modules: Path) -> None:
    concept = find_concept("tomato")
    shown = list(one_concept(modules, concept, "<t>", "train", 16))
    assert {entry.style for entry in shown} == {each.name for each in BASE_STYLES}
    assert all("<t>" in text and "tomato" not in text for entry in shown for text in entry.texts)
    plain, mirrored = shown[0].pixels, shown[1].pixels
    assert np.array_equal(plain[:, ::-1], mirrored)
    assert not np.array_equal(shown[2].pixels, plain)
    others = list(one_concept(modules, concept, "<t>", "held-out", 16))
    assert [entry.style for entry in others] == [each.name for each in HELD_OUT_STYLES]


def test_what_is_written_can_be_trained_on(modules: Path, tmp_path: Path) -> None:
    count = write_folder(one_concept(modules, find_concept("tomato"), "<t>", "train", 16), tmp_path / "data")
    examples = read_examples(tmp_path / "data", resolution=16)
    assert len(examples) == count == 12
    assert {(example.concept, example.style) for example in examples} == {("tomato", s.name) for s in BASE_STYLES}
    with Image.open(examples[0].path) as picture:
        assert picture.size == (16, 16)


def test_an_unknown_concept_is_refused_with_those_that_may_be_learnt() -> None:
    with pytest.raises(NotFound, match="honeybee"):
        find_concept("hen house")
