"""Pictures become files that carry their receipt, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.errors import InvalidRequest, NotFound
from scumble.images import Images, encode, receipt_text
from scumble.receipt import Receipt
from scumble.redraw import read_receipt
from support.receipts import a_receipt_of, golden_receipt


def some_images(count: int = 1) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 16, 3), dtype=np.uint8)
    return Images(pixels, a_receipt_of(prompt="né 苹果"))


def test_a_saved_picture_has_the_same_pixels_and_the_receipt(tmp_path: Path) -> None:
    images = some_images()
    (path,) = images.save(tmp_path / "a.png")
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), images.images[0])
    assert read_receipt(path) == images.receipt.of_image(0)


def test_a_file_holds_the_receipt_byte_for_byte(tmp_path: Path) -> None:
    golden = golden_receipt()
    receipt = Receipt.parse(json.loads(golden))
    for ending in ("png", "webp", "jpg"):
        (path,) = Images(some_images().images, receipt).save(tmp_path / f"a.{ending}")
        assert receipt_text(path) == golden[:-1] + ',"image":0}'


def test_several_pictures_are_numbered_and_know_their_place(tmp_path: Path) -> None:
    paths = some_images(3).save(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a-0.png", "a-1.png", "a-2.png"]
    assert [read_receipt(path).image for path in paths] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]


@pytest.mark.parametrize(("ending", "kind"), [(".png", "PNG"), (".webp", "WEBP"), (".jpg", "JPEG"), (".jpeg", "JPEG")])
def test_the_ending_says_the_format_and_each_holds_the_receipt(tmp_path: Path, ending: str, kind: str) -> None:
    images = some_images()
    (path,) = images.save(tmp_path / f"a{ending}")
    with Image.open(path) as picture:
        assert picture.format == kind
        assert np.abs(np.asarray(picture).astype(float) - images.images[0]).mean() <= 64
    assert read_receipt(path) == images.receipt.of_image(0)


def test_what_the_server_encoded_is_written_as_it_came(tmp_path: Path) -> None:
    receipt = a_receipt_of(options={"format": "webp"})
    content = encode(some_images().pil()[0], "webp", receipt.of_image(0), quality=40)
    images = Images(np.zeros((0, 0, 0, 3), np.uint8), receipt, None, (content,))
    assert len(images) == 1
    assert images.save(tmp_path / "a.webp")[0].read_bytes() == content
    (other,) = images.save(tmp_path / "a.png")
    with Image.open(other) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(images.pil()[0]))
    assert read_receipt(other) == receipt.of_image(0)


def test_a_receipt_that_a_jpeg_cannot_hold_is_refused(tmp_path: Path) -> None:
    large = Images(some_images().images, a_receipt_of(prompt="x" * 70_000))
    with pytest.raises(InvalidRequest, match="ask for png"):
        large.save(tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_only_known_endings_are_written_and_only_where_a_folder_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"\.webp"):
        some_images().save(tmp_path / "a.bmp")
    with pytest.raises(NotFound, match="missing"):
        some_images().save(tmp_path / "missing" / "a.png")
