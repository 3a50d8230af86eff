"""Chunks of a long prompt: nothing is lost, nothing is split, none is too wide, and commas and BREAK end them."""

from __future__ import annotations

import string

from hypothesis import given, settings
from hypothesis import strategies as st

from scumble_build.chunks import Break, Unit, chunked

ROOM = 6
UNITS = st.builds(Unit, st.integers(0, 9), width=st.integers(1, ROOM), is_comma=st.booleans())


def words(text: str) -> list[Unit | Break]:
    """A letter is a unit, `|` a BREAK."""
    return [Break.BREAK if letter == "|" else Unit(ord(letter), is_comma=letter == ",") for letter in text]


def read(chunks: list[list[Unit]]) -> list[str]:
    return ["".join(chr(unit.id) for unit in chunk) for chunk in chunks]


@settings(deadline=None)
@given(units=st.lists(UNITS, max_size=30), backtrack=st.integers(0, 5))
def test_no_unit_is_lost_or_split_and_no_chunk_is_too_wide(units: list[Unit], backtrack: int) -> None:
    chunks = chunked(units, ROOM, backtrack)
    assert [unit for chunk in chunks for unit in chunk] == units
    assert all(sum(unit.width for unit in chunk) <= ROOM for chunk in chunks)
    assert len(chunks) >= 1


@settings(deadline=None)
@given(text=st.text(string.ascii_lowercase, max_size=40))
def test_without_commas_chunks_are_filled_one_by_one(text: str) -> None:
    expected = [text[start : start + ROOM] for start in range(0, len(text), ROOM)] or [""]
    assert read(chunked(words(text), ROOM, backtrack=5)) == expected


def test_a_full_chunk_ends_behind_its_last_comma_if_that_is_near() -> None:
    assert read(chunked(words("abc,defg"), ROOM, backtrack=3)) == ["abc,", "defg"]
    assert read(chunked(words("a,bcdefg"), ROOM, backtrack=3)) == ["a,bcde", "fg"]
    assert read(chunked(words("abc,defg"), ROOM)) == ["abc,de", "fg"]


def test_break_ends_a_chunk() -> None:
    assert read(chunked(words("ab|c"), ROOM)) == ["ab", "c"]
    assert read(chunked(words("ab||c"), ROOM)) == ["ab", "", "c"]


def test_what_is_wide_goes_to_the_next_chunk_whole() -> None:
    wide = Unit(ord("W"), width=4, embedding=0)
    assert read(chunked([*words("abc"), wide], ROOM)) == ["abc", "W"]
    assert read(chunked([*words("ab"), wide], ROOM)) == ["abW"]
