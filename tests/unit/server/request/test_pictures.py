"""Pictures are decoded and bounded at the edge."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from scumble.errors import InvalidRequest
from scumble_server.request import pictures


def encode(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_png_jpeg_and_webp_are_read(form: str, options: dict[str, object]) -> None:
    decoded = pictures.decode("a", encode(Image.new("RGB", (6, 4), (200, 10, 30)), form, **options))
    assert decoded.size == (6, 4)
    assert np.abs(decoded.on_white.astype(int) - [200, 10, 30]).max() <= 6


def test_transparency_stays_apart() -> None:
    decoded = pictures.decode("a", encode(Image.new("RGBA", (2, 2), (1, 2, 3, 4)), "PNG"))
    assert decoded.pixels.tolist() == [[[1, 2, 3, 4]] * 2] * 2
    assert decoded.on_white.tolist() == [[[251, 251, 251]] * 2] * 2
    assert decoded.on_black.tolist() == [[[0, 0, 0]] * 2] * 2


def test_a_grey_picture_becomes_rgb() -> None:
    assert pictures.decode("a", encode(Image.new("L", (2, 2), 7), "PNG")).pixels.tolist() == [[[7] * 3] * 2] * 2


def test_a_16_bit_grey_picture_is_not_white() -> None:
    depth = Image.fromarray(np.array([[0, 257 * 40], [257 * 200, 65535]], np.uint16))
    assert pictures.decode("a", encode(depth, "PNG")).pixels[..., 0].tolist() == [[0, 40], [200, 255]]


def test_a_picture_that_says_it_lies_on_its_side_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    decoded = pictures.decode("a", encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif))
    assert decoded.size == (4, 6)


def test_the_digest_is_that_of_the_file() -> None:
    content = encode(Image.new("RGB", (2, 2)), "PNG")
    assert pictures.decode("a", content).digest == pictures.decode("b", content).digest
    assert pictures.decode("a", content).digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no picture"),
        (b"not a picture", "no picture"),
        (encode(Image.new("RGB", (4, 4)), "GIF"), "PNG, JPEG or WebP"),
        (encode(Image.new("RGB", (64, 64), (9, 200, 7)), "PNG")[:-40], "cannot be read"),
        (encode(Image.new("1", (20_000, 20_000)), "PNG"), "pixels"),
        (encode(Image.new("1", (4096, 4097)), "PNG"), "pixels"),
    ],
    ids=["empty", "text", "gif", "cut off", "bomb", "too large"],
)
def test_what_cannot_be_used_is_refused_by_name(content: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        pictures.decode("style", content)
    assert caught.value.fields["field"] == "images.style"
    assert "style" in caught.value.message
