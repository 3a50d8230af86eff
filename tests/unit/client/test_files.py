"""What is written is there whole or not at all, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import Refused, Unavailable
from scumble.files import new_folder, reading, replace_folder, whole_file, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_whole(file, "not bytes")  # type: ignore[arg-type]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_that_was_begun_is_removed_when_something_is_raised(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_file(tmp_path / "a", durable=True) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_the_place_of_the_one_before_or_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    for content in (b"one", b"two"):
        with replace_folder(target, durable=True) as work:
            (work / "inner").mkdir()
            (work / "inner" / "a").write_bytes(content)
    with pytest.raises(ZeroDivisionError), replace_folder(target) as work:
        (work / "a").write_bytes(bytes([1 // 0]))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert (target / "inner" / "a").read_bytes() == b"two"


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-1.partial").mkdir()
    (tmp_path / ".step-1.partial" / "half").write_bytes(b"half")
    with replace_folder(tmp_path / "step-1") as work:
        assert list(work.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_new_folder_overwrites_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as work:
        (work / "file").write_bytes(b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"
    with pytest.raises(Refused, match="nothing was overwritten"), new_folder(tmp_path / "a"):
        pass
    with pytest.raises(Unavailable, match="check space"), new_folder(tmp_path / "a" / "b" / "file" / "c"):
        pass


def test_pieces_are_read_as_one_file() -> None:
    assert reading(iter([b"", b"ab", memoryview(b"cde"), b""])).read(4) == b"abcd"
