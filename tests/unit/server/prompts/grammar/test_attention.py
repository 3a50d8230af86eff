"""The webui's documented examples of emphasis, and what follows from its rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble_build.chunks import Break
from scumble_server.prompts.grammar.attention import Span, parse_attention

DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}
MORE = {
    "": [("", 1.0)],
    "[less]": [("less", 1 / 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    "closed) only]": [("closed) only]", 1.0)],
    r"a \\ b \x": [(r"a \ b x", 1.0)],
    "a : b": [("a : b", 1.0)],
    "a:1.5)": [("a:1.5)", 1.0)],
    "(a: 1.5 )": [("a", 1.5)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:1.2.3)": [("a:1.2.3)", 1.1)],
    "(a:b)": [("a:b", 1.1)],
}


@pytest.mark.parametrize("text", DOCUMENTED)
def test_documented_examples(text: str) -> None:
    assert parse_attention(text) == DOCUMENTED[text]


@pytest.mark.parametrize("text", MORE)
def test_other_cases(text: str) -> None:
    assert parse_attention(text) == MORE[text]


def test_brackets_of_two_kinds_close_on_their_own() -> None:
    (_, first), (_, second), (_, third) = parse_attention("(a [b) c]")
    assert (first, second, third) == (1.1, 1.1 * (1 / 1.1), 1 / 1.1)


def test_a_break_eats_the_space_around_it() -> None:
    assert parse_attention("a BREAK\nb BREAKFAST") == [Span("a", 1.0), Break.BREAK, Span("b BREAKFAST", 1.0)]
    assert parse_attention("BREAK") == [Span("", 1.0), Break.BREAK, Span("", 1.0)]


def test_a_break_stays_one_in_brackets() -> None:
    assert parse_attention("(a BREAK b:2)") == [Span("a", 2.0), Break.BREAK, Span("b", 2.0)]


@given(st.text(alphabet="ab ,.1:()[]\\"))
def test_any_text_can_be_read(text: str) -> None:
    pieces = parse_attention(text)
    assert pieces
    letters = "".join(piece.text for piece in pieces if isinstance(piece, Span))
    assert [each for each in letters if each in "ab"] == [each for each in text if each in "ab"]
