"""A prompt of the greatest length is read in a bounded CPU time, whatever it holds."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
from compel.prompt_parser import PromptParser
from hypothesis import given, settings
from hypothesis import strategies as st
from pyparsing import ParseBaseException

from scumble.errors import InvalidRequest
from scumble.request import Request
from scumble_server.memory.collection import collect_seldom
from scumble_server.prompts.compel_parsing import MAX_COST, parse
from scumble_server.prompts.grammar.attention import parse_attention
from scumble_server.prompts.grammar.composition import parse_composition
from scumble_server.prompts.grammar.schedule import texts_by_step
from scumble_server.prompts.grammar.tags import find_tag, parse_tags
from scumble_server.prompts.length import MAX_CHARACTERS, check_lengths
from support.cpu_time import cpu_seconds
from support.searching import examples

MOST_STEPS = 1000
CPU_SECONDS = 0.2
READERS: dict[str, Callable[[str], object]] = {
    "attention": parse_attention,
    "schedule": lambda text: texts_by_step(text, MOST_STEPS),
    "composition": parse_composition,
    "find_tag": find_tag,
    "tags": parse_tags,
    "compel": lambda text: parse(text, "prompt"),
}
PIECES = [
    "a(", "(", "[", " ", "\t\n", "a[b:", "[a|", "[a:b:.5]", "[a|b]", "[a|b][a|b|c]", "[a:a:7]", "((a", "(a:1.1)", "\\(",
    "a+ ", "cat ", "(cat)1.2 ", "(cat:1.2) ", "a, ", '"a b"+ ', "(a)++", "a.b ", "a-",
    '("a","b").blend(1,1)', '"', "1 ", '"a" ', "(a) ", "=", "a1", "1a+", "and ", "s cat ", ".and(", "\\,",
    "AND ", " BREAK", "BREAK ", "<lora:", "> <lora:", "<lora:n/a>", "[[]", "([)]", ":", "|", ",", "1.",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def collected_as_in_a_server() -> Iterator[None]:
    usual = gc.get_threshold()
    collect_seldom()
    yield
    gc.unfreeze()
    gc.set_threshold(*usual)


def seconds(reader: str, text: str) -> float:
    def read() -> None:
        with contextlib.suppress(InvalidRequest, RecursionError, ParseBaseException, PromptParser.ParsingException):
            READERS[reader](text)

    return cpu_seconds(read, CPU_SECONDS)


def filled(piece: str) -> str:
    return (piece * (MAX_CHARACTERS // len(piece) + 1))[:MAX_CHARACTERS]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("piece", PIECES)
def test_one_piece_again_and_again(reader: str, piece: str) -> None:
    assert seconds(reader, filled(piece)) <= CPU_SECONDS


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + ")" * 5000,
        "[" * 3000 + "a" + ":.5]" * 1700,
        "".join(f"[a:b:{step}]" for step in range(1, 1000)),
        ("[a|" * 10 + "b" + "]" * 10) * 240,
        ">" + "<lora:" * 1600,
    ],
    ids=["deep", "deep and closed", "a change at each step", "nested alternations", "tags that never close"],
)
def test_nesting_and_many_changes(reader: str, text: str) -> None:
    assert seconds(reader, text) <= CPU_SECONDS


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=examples(25), deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4))
def test_any_few_pieces_again_and_again(reader: str, pieces: list[str]) -> None:
    assert seconds(reader, filled("".join(pieces))) <= CPU_SECONDS


@pytest.mark.parametrize("word", ["a+ ", "cat++ ", "cat- "])
def test_150_weighted_words_of_compel_are_read_soon(word: str) -> None:
    text = word * 150
    parse(text, "prompt")
    assert seconds("compel", text) <= CPU_SECONDS
    assert seconds("compel", "cat " * 1000 + text) <= CPU_SECONDS, "what is plain costs nothing"


@pytest.mark.parametrize("phrase", ["(cat)1.2 ", "(a big cat)1.2 ", "(a)1 "])
def test_100_weighted_phrases_of_compel_are_read_soon(phrase: str) -> None:
    parse(phrase * 100, "prompt")
    assert seconds("compel", phrase * 100) <= CPU_SECONDS


def test_more_syntax_than_compel_reads_soon_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"they count 604, at most {MAX_COST}"):
        parse("(a)+ " * 151, "prompt")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "prompt_2", "negative_prompt_2"])
def test_what_is_longer_is_refused_by_name_before_any_grammar(field: str) -> None:
    long = "<lora:" * 30_000
    asked = {"prompt": "a", field: long} if field in Request.model_fields else {"prompt": "a", "options": {field: long}}
    with pytest.raises(InvalidRequest, match="180000 characters, at most 10000") as refused:
        check_lengths(Request.parse(asked))
    assert refused.value.fields["field"].endswith(field)
