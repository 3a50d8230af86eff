"""The picture that a request begins with: how much of it changes where nothing is said, and what makes no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scumble.errors import InvalidRequest
from scumble.request import Options
from scumble_server.request.original import check, original_of, strength_of


@pytest.mark.parametrize(
    ("options", "strength"),
    [
        ({}, 1.0),
        ({"image": "a"}, 0.8),  # as diffusers' img2img pipelines
        ({"image": "a", "mask": "b"}, 1.0),  # as its inpainting pipelines
        ({"image": "a", "strength": 0.0}, 0.0),
        ({"image": "a", "mask": "b", "strength": 0.3}, 0.3),
    ],
)
def test_how_much_of_it_changes(options: dict[str, Any], strength: float) -> None:
    assert strength_of(Options(**options)) == strength


@pytest.mark.parametrize(
    ("options", "inpaints", "field"),
    [
        ({"mask": "a"}, False, "options.mask"),
        ({"strength": 0.5}, False, "options.strength"),
        ({}, True, "options.image"),
        ({"image": "a"}, True, "options.mask"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], inpaints: bool, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(Options(**options), inpaints=inpaints)
    assert refused.value.fields["field"] == field


def test_options_that_do_are_not() -> None:
    check(Options(), inpaints=False)
    check(Options(image="a", strength=0.2), inpaints=False)
    check(Options(image="a", mask="b"), inpaints=True)


def test_the_pictures_of_a_first_pass_are_known_by_their_pixels() -> None:
    one, other = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)
    assert original_of(one, None).picture.digest == original_of(one.copy(), None).picture.digest
    assert original_of(one, None).picture.digest != original_of(other, None).picture.digest
    assert original_of(one, None).picture.size == (3, 2)
