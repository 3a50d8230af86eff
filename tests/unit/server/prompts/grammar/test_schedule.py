"""The webui's documented examples of step editing and alternation, and what follows from its rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble_server.prompts.grammar.schedule import parse_schedule, texts_by_step

DOCUMENTED = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [{b|d{:.5] c": [(5, "a  c"), (10, "a {b|d{ c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)],
    "[fe|]male": [(step, "female" if step % 2 else "male") for step in range(1, 11)],
    "[fe|||]male": [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)],
}
LANDSCAPE = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
    "[ in background:0.25] [shoddy:masterful:0.5]"
)
MORE = {
    "[a:b:0]": [(10, "b")],
    "[a:b:-1]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:b:1.0]": [(10, "a")],
    "[a::0.5]": [(5, "a"), (10, "")],
    "[:b:0.5]": [(5, ""), (10, "b")],
    "[a:b]": [(10, "[a:b]")],
    "[a:b:c:2]": [(10, "[a:b:c:2]")],
    "a | b [c:3]": [(10, "a | b [c:3]")],
    "(a|b) [c:3]": [(10, "(a|b) [c:3]")],
    "[c:3] \\": [(10, "[c:3] \\")],
    r"\[a:b:3\]": [(10, r"\[a:b:3\]")],
    "(a [b:c:3]:1.2)": [(3, "(a b:1.2)"), (10, "(a c:1.2)")],
    "[[a|b]:c:3]": [(1, "a"), (2, "b"), (3, "a"), *((step, "c") for step in range(4, 11))],
}


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_documented_examples(prompt: str) -> None:
    assert parse_schedule(prompt, 10) == DOCUMENTED[prompt]


def test_the_documented_landscape() -> None:
    assert parse_schedule(LANDSCAPE, 100) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize("prompt", MORE)
def test_other_cases(prompt: str) -> None:
    assert parse_schedule(prompt, 10) == MORE[prompt]


def test_a_text_for_every_step() -> None:
    assert texts_by_step("[a:b:2][c|d]", 4) == ["ac", "ad", "bc", "bd"]


def test_brackets_without_end_are_text() -> None:
    prompt = "[" * 20_000 + "a"
    assert parse_schedule(prompt, 10) == [(10, prompt)]


@given(st.text(alphabet="ab []():|3.\\"), st.integers(1, 12))
def test_any_text_has_one_text_a_step(prompt: str, steps: int) -> None:
    assert len(texts_by_step(prompt, steps)) == steps
