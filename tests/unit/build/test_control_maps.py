"""Control maps: against OpenCV itself, on pictures whose answer is known, and what is refused."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from scumble.errors import InvalidRequest
from scumble_build.control_maps import NAMES, Pixels, Recolour, control_map, parse

WIDTH, HEIGHT = 96, 64


def picture() -> Pixels:
    """A dark disc and a red bar on a light ground."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (240, 240, 230))
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 10, 50, 50), fill=(30, 30, 60))
    draw.rectangle((65, 5, 75, 60), fill=(220, 20, 20))
    return np.asarray(image)


def mapped(how: str | dict[str, Any], pixels: Pixels | None = None) -> Pixels:
    pixels = picture() if pixels is None else pixels
    found = control_map(pixels, pixels.shape[1], pixels.shape[0], parse(how))
    assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
    return found


def test_canny_is_opencvs() -> None:
    for low, high in ((100, 200), (10, 40)):
        expected = cv2.Canny(picture(), low, high)
        assert (mapped({"name": "canny", "low": low, "high": high}) == expected[..., None]).all()
    assert (mapped("canny") == cv2.Canny(picture(), 100, 200)[..., None]).all()


@pytest.mark.parametrize("name", ["canny", "soft_edge", "line_art", "scribble"])
def test_lines_are_white_on_black_where_the_edges_are(name: str) -> None:
    found = mapped(name)[..., 0]
    ring = np.hypot(*np.meshgrid(np.arange(WIDTH) - 30, np.arange(HEIGHT) - 30))
    edge, ground = (ring > 16) & (ring < 23), (ring > 30) & (ring < 32)
    assert found[edge].mean() > 4 * found[ground].mean() + 9
    assert found.max() >= 120
    assert (mapped(name, np.full((32, 32, 3), 90, np.uint8)) == 0).all(), "nothing to see"


def test_tile_is_the_picture_with_less_detail() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    fine = np.repeat(checks[..., None], 3, 2).astype(np.uint8)
    assert np.abs(mapped({"name": "tile", "factor": 8}, fine).astype(int) - 127.5).max() <= 1
    assert (mapped({"name": "tile", "factor": 1}) == picture()).all()
    blurred = cv2.GaussianBlur(picture().astype(np.float32), (0, 0), 3.0)
    assert np.abs(mapped({"name": "tile", "factor": 1, "sigma": 3.0}) - blurred).max() <= 0.5


def test_recolour_keeps_the_light() -> None:
    lab = cv2.cvtColor(picture(), cv2.COLOR_RGB2LAB)[..., :1]
    assert (mapped("recolour") == lab).all()
    assert (mapped({"name": "recolour", "by": "intensity"}) == picture().max(2, keepdims=True)).all()
    assert mapped({"name": "recolour", "gamma": 2.0}).mean() < mapped("recolour").mean()


def test_invert_twice_is_the_picture() -> None:
    assert (mapped("invert", mapped("invert")) == picture()).all()
    assert (mapped("invert").astype(int) + picture() == 255).all()


def test_the_picture_is_resized_before_it_is_preprocessed() -> None:
    """By diffusers' own rule; a picture that has the size stays as it is."""
    theirs = VaeImageProcessor(do_convert_rgb=True, do_normalize=False).preprocess(
        Image.fromarray(picture()), height=40, width=72
    )
    found = control_map(picture(), 72, 40, None)
    assert np.abs(found / 255 - theirs[0].permute(1, 2, 0).numpy()).max() <= 1e-6
    assert (control_map(picture(), 72, 40, parse("canny")) == cv2.Canny(found, 100, 200)[..., None]).all()
    assert control_map(picture(), WIDTH, HEIGHT, None) is not None
    assert (control_map(picture(), WIDTH, HEIGHT, None) == picture()).all()


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(NAMES), height=st.integers(8, 40), width=st.integers(8, 40), seed=st.integers(0, 9))
def test_every_picture_has_a_map(name: str, height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert mapped(name, pixels).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("depth", "there is no preprocessor 'depth'; there are canny"),
        ({"low": 3}, "there is no preprocessor None"),
        ({"name": ["canny"]}, "there is no preprocessor"),
        ({"name": "canny", "hi": 3}, "hi: Extra inputs are not permitted; its parameters are high, low"),
        ({"name": "canny", "low": -1}, "low: Input should be greater than or equal to 0"),
        ({"name": "canny", "low": "much"}, "low: Input should be a valid integer"),
        ({"name": "soft_edge", "sigma": 1e9}, "sigma: Input should be less than"),
        ({"name": "recolour", "by": "hue"}, "by: Input should be 'luminance' or 'intensity'"),
        ({"name": "invert", "low": 1}, "its parameters are none"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused_by_name(asked: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        parse(asked)
    assert caught.value.fields == {"field": "adapters.preprocess"}


def test_parameters_have_defaults() -> None:
    assert parse("recolour") == Recolour() == parse({"name": "recolour"})
