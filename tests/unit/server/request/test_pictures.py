"""Pictures are decoded and bounded at the edge."""

from __future__ import annotations

import io
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

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


def large(side: int = 4096) -> bytes:
    return encode(Image.new("1", (side, side)), "PNG")


def test_pixels_of_a_request_are_counted_from_headers_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "to_eight_bits", lambda _: pytest.fail("a picture was decoded"))
    images = {f"p{index}": large() for index in range(5)}
    with pytest.raises(InvalidRequest, match=r"images\.p4: with it, .* more than 67108864 pixels in all") as caught:
        pictures.decode_all(images)
    assert caught.value.fields["field"] == "images.p4"


def test_an_open_request_keeps_no_pixels() -> None:
    tracemalloc.start()
    try:
        kept = pictures.decode_all({f"p{index}": large() for index in range(4)})
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {picture.size for picture in kept.values()} == {(4096, 4096)}
    assert held < 1 << 20
    assert peak < 13 * pictures.MAX_PIXELS, "one after another"


def test_pictures_of_all_requests_are_read_within_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    together, most, lock = 0, 0, threading.Lock()
    convert = pictures.to_eight_bits

    def watched(picture: Image.Image) -> Image.Image:
        nonlocal together, most
        with lock:
            together += picture.width * picture.height
            most = max(most, together)
        time.sleep(0.01)
        converted = convert(picture)
        with lock:
            together -= picture.width * picture.height
        return converted

    monkeypatch.setattr(pictures, "to_eight_bits", watched)
    monkeypatch.setattr(pictures, "_reading", pictures.PixelBudget(150 * 150))
    content = encode(Image.new("RGB", (100, 100)), "PNG")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: pictures.decode(str(name), content), range(16)))
    assert most == 2 * 100 * 100


def test_a_picture_that_is_larger_than_the_budget_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_reading", pictures.PixelBudget(1))
    assert pictures.decode("a", encode(Image.new("RGB", (9, 5)), "PNG")).size == (9, 5)
