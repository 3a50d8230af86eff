"""Numbers about pictures, on pictures whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scumble.errors import InvalidRequest
from scumble_build.control_maps import Canny
from scumble_demo.evaluation.concept import read_taught
from scumble_demo.evaluation.measures import edge_f1, first_rate, similarity
from scumble_demo.evaluation.run import check_measurable
from scumble_demo.evaluation.trial import COUNT, known_prompts, some_concepts
from scumble_demo.scorer import Scorer
from scumble_registry.results import Result
from scumble_trainers.base import find_base
from support.places import DEMO_BASE

SIDE = 128
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def square(left: int, colour: str = "black", size: int = 50) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).rectangle((left, 40, left + size, 40 + size), fill=colour)
    return picture


def edges(picture: Image.Image) -> NDArray[np.uint8]:
    return Canny().apply(np.array(picture))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.load(DEMO_BASE)


def test_edges_of_a_picture_are_its_own() -> None:
    assert edge_f1([square(20)], [edges(square(20))]) == 1.0


def test_an_edge_may_be_a_pixel_off_and_no_more() -> None:
    near, far = (edge_f1([square(20)], [edges(square(20 + off))]) for off in (1, 6))
    assert near > 0.95
    assert far < 0.7


def test_no_edges_are_no_agreement() -> None:
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    assert edge_f1([blank], [edges(square(20))]) == edge_f1([blank], [edges(blank)]) == 0.0


def test_f1_is_the_mean_over_pictures() -> None:
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    assert edge_f1([square(20), blank], [edges(square(20))] * 2) == 0.5


def test_every_picture_is_likest_itself_and_never_the_next(scorer: Scorer) -> None:
    pictures = [square(10 + 8 * index, colour, 20 + 10 * index) for index, colour in enumerate(COLOURS)]
    assert first_rate(scorer, pictures, pictures) == 1.0
    assert first_rate(scorer, pictures, [*pictures[1:], pictures[0]]) == 0.0


def test_a_picture_is_liker_itself_than_another(scorer: Scorer) -> None:
    one, other = square(20, "red", 30), square(60, "green", 60)
    assert similarity(scorer, [one], [one]) == pytest.approx(1.0, abs=1e-5)
    assert similarity(scorer, [one], [other]) < 0.99


def test_prompts_are_of_concepts_that_the_base_knows() -> None:
    chosen = some_concepts()
    assert len(set(chosen)) == COUNT == len(known_prompts(chosen))
    assert not any(concept.held_out for concept in chosen)


def test_without_a_scorer_nothing_is_measured(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="needs a scorer"):
        check_measurable(find_base(str(tiny_base), tmp_path))
    check_measurable(find_base(str(DEMO_BASE), tmp_path))


def test_one_concept_and_its_word_must_be_known(tmp_path: Path) -> None:
    result = Result("x", None, "", (), {}, {})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a hen", "concept": "hen"}\n', "utf-8")
    with pytest.raises(InvalidRequest, match="with its word as --trigger"):
        read_taught(tmp_path, result)
