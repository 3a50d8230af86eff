"""Every mode that Pillow opens is read as what it shows, or refused; transparency is laid on a ground."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scumble_build.pictures import BLACK, WHITE, lay_on, to_eight_bits


def reopened(picture: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4))
def test_16_bit_grey_keeps_its_range(values: list[int]) -> None:
    picture = reopened(Image.fromarray(np.array(values, np.uint16).reshape(2, 2)))
    assert picture.mode == "I;16"
    read = np.asarray(to_eight_bits(picture))
    expected = np.array(values, np.float64).reshape(2, 2, 1) / 65535 * 255
    assert read.shape == (2, 2, 3)
    assert np.abs(read - expected).max() <= 0.5


def test_a_transparent_grey_of_16_bits_is_transparent() -> None:
    picture = reopened(Image.fromarray(np.array([[7, 60000]], np.uint16)), transparency=60000)
    assert to_eight_bits(picture).getchannel("A").getdata()[1] == 0
    assert to_eight_bits(picture).getchannel("A").getdata()[0] == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I"])
def test_grey_is_grey_in_every_mode(mode: str) -> None:
    if mode in {"I;16", "I"}:
        picture = Image.fromarray(np.full((2, 2), 128 * 257, np.uint16 if mode == "I;16" else np.int32))
    elif mode == "LAB":
        picture = Image.new("LAB", (2, 2), (137, 128, 128))  # L* 53.6 is sRGB 128
    else:
        grey = Image.new("RGB", (2, 2), (128, 128, 128))
        picture = (grey.quantize() if mode in {"P", "PA"} else grey).convert(mode, dither=Image.Dither.NONE)
    read = np.asarray(to_eight_bits(reopened(picture, "TIFF")).convert("RGB"))
    assert np.abs(read.astype(int) - (255 if mode == "1" else 128)).max() <= 2


@pytest.mark.parametrize("picture", [Image.new("F", (2, 2)), Image.fromarray(np.full((2, 2), 70000, np.int32))])
def test_what_has_no_white_is_refused(picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="save it"):
        to_eight_bits(picture)


@given(st.tuples(*[st.integers(0, 255)] * 4), st.sampled_from([BLACK, WHITE]))
def test_transparency_is_laid_on_its_ground(colour: tuple[int, ...], ground: int) -> None:
    laid = lay_on(np.full((1, 1, 4), colour, np.uint8), ground)[0, 0]  # type: ignore[arg-type]
    alpha = colour[3] / 255
    assert np.abs(laid - (np.array(colour[:3]) * alpha + ground * (1 - alpha))).max() <= 1
    assert lay_on(np.full((1, 1, 3), colour[:3], np.uint8), BLACK).tolist() == [[list(colour[:3])]]
