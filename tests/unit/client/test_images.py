"""Pictures become PNG files that carry their receipt, whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.errors import InvalidRequest, NotFound
from scumble.images import Images, write_whole
from scumble.receipt import read_receipt


def some_images(count: int = 1) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 16, 3), dtype=np.uint8)
    return Images(pixels, {"schema": 1, "prompt": "né 苹果", "seeds": list(range(count))})


def test_a_saved_picture_has_the_same_pixels_and_the_receipt(tmp_path: Path) -> None:
    images = some_images()
    (path,) = images.save(tmp_path / "a.png")
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), images.images[0])
    assert read_receipt(path) == images.receipt | {"image": 0}


def test_several_pictures_are_numbered_and_know_their_place(tmp_path: Path) -> None:
    paths = some_images(3).save(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a-0.png", "a-1.png", "a-2.png"]
    assert [read_receipt(path)["image"] for path in paths] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]


def test_only_png_is_written_and_only_where_a_folder_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="PNG"):
        some_images().save(tmp_path / "a.jpg")
    with pytest.raises(NotFound, match="missing"):
        some_images().save(tmp_path / "missing" / "a.png")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_whole(file, "not bytes")  # type: ignore[arg-type]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
