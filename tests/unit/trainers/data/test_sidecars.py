"""Folders without metadata.jsonl: captions in text files, from names, or one for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scumble.errors import InvalidRequest, NotFound
from scumble_trainers.data.dataset import data_digest, read_examples, with_captions


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Two pictures, one in a folder within, as kohya's trainers have them."""
    folder = tmp_path / "data"
    (folder / "10_apple").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(folder / "10_apple/red_apple-02.png")
    Image.new("RGB", (16, 16), "green").save(folder / "pear.jpg")
    return folder


def test_a_text_beside_each_picture_is_its_captions(bare: Path) -> None:
    (bare / "10_apple/red_apple-02.txt").write_text("\ufeffa red apple\n\n an apple \n", "utf-8")
    (bare / "pear.caption").write_text("a pear", "utf-8")
    apple, pear = read_examples(bare, resolution=16)
    assert (apple.name, apple.texts) == ("10_apple/red_apple-02.png", ("a red apple", "an apple"))
    assert (pear.name, pear.texts) == ("pear.jpg", ("a pear",))


def test_it_is_the_same_data_as_with_lines(bare: Path) -> None:
    (bare / "10_apple/red_apple-02.txt").write_text("a red apple", "utf-8")
    (bare / "pear.txt").write_text("a pear", "utf-8")
    before = data_digest(read_examples(bare, resolution=16))
    lines = [
        {"file_name": "10_apple/red_apple-02.png", "text": "a red apple"},
        {"file_name": "pear.jpg", "text": "a pear"},
    ]
    (bare / "metadata.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)), "utf-8")
    assert data_digest(read_examples(bare, resolution=16)) == before


def test_a_picture_without_its_text_is_named_with_the_file_that_is_missing(bare: Path) -> None:
    (bare / "pear.txt").write_text("a pear", "utf-8")
    with pytest.raises(InvalidRequest) as raised:
        read_examples(bare, resolution=16)
    assert raised.value.fields["problems"] == ["10_apple/red_apple-02.png has no caption (10_apple/red_apple-02.txt)"]


def test_without_any_caption_all_ways_to_give_them_are_said(bare: Path) -> None:
    with pytest.raises(InvalidRequest, match="2 pictures and no captions") as raised:
        read_examples(bare, resolution=16)
    for way in (".txt", "metadata.jsonl", '--caption "{name}"', '--caption "a photo'):
        assert way in raised.value.message


def test_a_template_without_text_needs_no_captions(bare: Path) -> None:
    templates = ("a photo of {name}", "a fruit")
    examples = with_captions(read_examples(bare, resolution=16, templates=templates), templates)
    assert [example.texts for example in examples] == [
        ("a photo of red apple", "a fruit"),
        ("a photo of pear", "a fruit"),
    ]
    with pytest.raises(InvalidRequest, match="no captions"):
        read_examples(bare, resolution=16, templates=("{text}, a photo",))


def test_lines_without_text_are_enough_for_a_template_too(bare: Path) -> None:
    (bare / "part.jsonl").write_text(json.dumps({"file_name": "pear.jpg", "style": "flat"}), "utf-8")
    templates = ("a {name}, {style}",)
    (pear,) = with_captions(read_examples(bare / "part.jsonl", resolution=16, templates=templates), templates)
    assert pear.texts == ("a pear, flat",)


def test_what_is_hidden_is_no_picture(bare: Path) -> None:
    (bare / "._pear.jpg").write_bytes(b"macOS")
    (bare / ".ipynb_checkpoints").mkdir()
    (bare / ".ipynb_checkpoints/pear.jpg").write_bytes((bare / "pear.jpg").read_bytes())
    assert len(read_examples(bare, resolution=16, templates=("{name}",))) == 2


def test_a_folder_without_pictures_and_none_at_all_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no metadata\.jsonl and no pictures"):
        read_examples(tmp_path, resolution=16, templates=("{name}",))
    with pytest.raises(NotFound, match="nowhere does not exist"):
        read_examples(tmp_path / "nowhere", resolution=16)


def test_a_text_that_is_not_utf_8_is_named(bare: Path) -> None:
    (bare / "pear.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"pear\.txt is not UTF-8"):
        read_examples(bare, resolution=16)
