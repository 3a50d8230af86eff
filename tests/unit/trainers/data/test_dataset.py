"""Bad data is named, all of it, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scumble.errors import InvalidRequest, NotFound
from scumble_build.pictures import BLACK
from scumble_trainers.data.dataset import data_digest, hold_out, load_picture, read_examples, with_captions


def metadata(folder: Path, *lines: str) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def entry(name: str, **rest: Any) -> str:
    return json.dumps({"file_name": name, **({"text": "a disc"} | rest)})


def test_examples_come_ordered_with_all_their_captions(make_data: Any) -> None:
    folder = make_data(3)
    metadata(folder, entry("02.png"), entry("00.png", texts=["a disc", "disc"]), "", entry("01.png"))
    examples = read_examples(folder, resolution=16)
    assert [example.name for example in examples] == ["00.png", "01.png", "02.png"]
    assert examples[0].texts == ("a disc", "disc")


@pytest.mark.parametrize("missing", ["folder", "metadata"])
def test_a_missing_folder_or_metadata_is_not_found(tmp_path: Path, missing: str) -> None:
    with pytest.raises(NotFound, match="set --data to a folder"):
        read_examples(tmp_path if missing == "metadata" else tmp_path / "nowhere", resolution=16)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    metadata(tmp_path)
    with pytest.raises(InvalidRequest, match="names no picture"):
        read_examples(tmp_path, resolution=16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", 'line 2: no "file_name"'),
        ('{"text": "a disc"}', 'line 2: no "file_name"'),
        ('{"file_name": "01.png"}', "line 2: 01.png has no caption"),
        (entry("01.png", text="  "), "line 2: 01.png has no caption"),
        (entry("01.png", texts="many"), 'line 2: "texts" of 01.png'),
        (entry("00.png"), "line 2: 00.png is named twice"),
        (entry("../data/01.png"), "is outside the folder"),
        (entry("09.png"), "line 2: 09.png does not exist"),
        (entry("broken.png"), "line 2: broken.png is broken or not a picture"),
        (entry("cut.png"), "line 2: cut.png is broken or not a picture"),
        (entry("small.png"), "line 2: small.png is too small: 20x8, at least 16"),
    ],
)
def test_a_bad_line_is_named(make_data: Any, line: str, message: str) -> None:
    folder = make_data(2)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:60])
    Image.new("RGB", (20, 8)).save(folder / "small.png")
    metadata(folder, entry("00.png"), line)
    with pytest.raises(InvalidRequest, match="cannot be trained on") as raised:
        read_examples(folder, resolution=16)
    assert message in raised.value.message


def test_every_problem_is_reported_at_once(make_data: Any) -> None:
    folder = make_data(1)
    metadata(folder, *(entry(f"missing-{index}.png") for index in range(12)))
    with pytest.raises(InvalidRequest, match="and 2 more") as raised:
        read_examples(folder, resolution=16)
    assert len(raised.value.fields["problems"]) == 12


def test_a_picture_without_a_line_is_reported(make_data: Any) -> None:
    folder = make_data(2)
    metadata(folder, entry("00.png"))
    with pytest.raises(InvalidRequest, match=r"01\.png has no line in metadata\.jsonl"):
        read_examples(folder, resolution=16)


def test_a_file_of_lines_is_a_part_of_a_folder(make_data: Any) -> None:
    folder = make_data(3)
    part = folder / "part.jsonl"
    part.write_text(entry("01.png", concept="disc"), "utf-8")
    (example,) = read_examples(part, resolution=16)
    assert (example.name, example.concept, example.size) == ("01.png", "disc", (16, 16))
    with pytest.raises(InvalidRequest, match="is not UTF-8 text"):
        read_examples(folder / "00.png", resolution=16)


def test_the_digest_follows_content_and_not_the_place(make_data: Any, tmp_path: Path) -> None:
    folder = make_data(2)
    before = data_digest(read_examples(folder, resolution=16))
    moved = folder.rename(tmp_path / "elsewhere")
    assert data_digest(read_examples(moved, resolution=16)) == before
    metadata(moved, entry("00.png"), entry("01.png", text="another"))
    assert data_digest(read_examples(moved, resolution=16)) != before


def test_holding_out_takes_a_share_by_seed_and_leaves_something_to_train_on() -> None:
    trained, held = hold_out(range(40), fraction=0.1, seed=1, most=64)
    assert len(held) == 4
    assert sorted(trained + held) == list(range(40))
    assert hold_out(range(40), fraction=0.1, seed=1, most=64) == (trained, held)
    assert hold_out(range(40), fraction=0.1, seed=2, most=64) != (trained, held)
    assert len(hold_out(range(40), fraction=0.5, seed=1, most=3)[1]) == 3
    assert hold_out(range(1), fraction=0.5, seed=1, most=3) == ([0], [])
    assert hold_out(range(2), fraction=0, seed=1, most=3) == ([0, 1], [])


def test_transparency_becomes_white_and_the_centre_is_cut_out(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 8, 32))
    picture.save(tmp_path / "wide.png")
    loaded = load_picture(tmp_path / "wide.png", (16, 16))
    assert loaded.size == (16, 16)
    assert loaded.getpixel((8, 8)) == (255, 255, 255)
    assert loaded.getpixel((0, 8)) == (255, 255, 255)


def test_captions_in_place_of_the_datas_own(make_data: Any) -> None:
    folder = make_data(1)
    metadata(folder, entry("00.png", texts=["a disc", "disc"], style="flat"))
    examples = read_examples(folder, resolution=16)
    assert with_captions(examples, ()) == examples
    (filled,) = with_captions(examples, ("a thing, {style} style", "{text} on white", "a thing, {style} style"))
    assert filled.texts == ("a thing, flat style", "a disc on white", "disc on white")


def test_a_caption_cannot_say_a_style_that_nothing_tells(make_data: Any) -> None:
    with pytest.raises(InvalidRequest, match='has no "style"'):
        with_captions(read_examples(make_data(1), resolution=16), ("a {style} thing",))


def test_grey_of_16_bits_is_no_white_and_transparency_has_a_ground(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 257 * 90, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    loaded = {
        "deep": load_picture(tmp_path / "deep.png", (16, 16)),
        "on white": load_picture(tmp_path / "clear.png", (16, 16)),
        "on black": load_picture(tmp_path / "clear.png", (16, 16), BLACK),
    }
    assert {name: picture.getextrema() for name, picture in loaded.items()} == {
        "deep": ((90, 90),) * 3,
        "on white": ((255, 255),) * 3,
        "on black": ((0, 0),) * 3,
    }
