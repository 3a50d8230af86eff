"""What is parsed in short equals what compel parses of the whole prompt."""

from __future__ import annotations

import pytest
from compel.prompt_parser import PromptParser
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble_server.prompts.compel_parsing import parse

COMPEL = PromptParser()
PARTS = [
    "a", "big", "cat", "näive", "東京", "x_y", "12", "1.2", ".5", "-", "+", "++", "--", ",", ".", ":", "=", "\\(",
    "\\)", '\\"', " ", "  ", "\n", "(", ")", '"', "(cat)", "(big cat)1.2", '"a b"+', ".swap(dog)", ".attend(1.2)",
    ".blend(1,0.5)", ".blend(1, 1, no_normalize)", ".and()", ".and(1, 2)", '("a b", "c").blend(1, 2)', "s_start=0.1",
    "Lora", "and", "no_normalize", "\ue000", "\U000f0000", "<", "'", "%",
]  # fmt: skip


def outcome(read: object, text: str) -> str:
    try:
        return str(read(text))  # type: ignore[operator]
    except RecursionError:
        return "nested too deep"
    except Exception as error:  # noqa: BLE001 - whatever it is
        return type(error).__name__


@pytest.mark.parametrize(
    "text",
    [
        "a big red cat",
        "a big cat .swap(dog)",
        "one two three.swap(four five, s_start=0.1)",
        "x,y , z",
        "a (b c)++ d 12 e3 f_g",
        'a "quoted (thing)++ here" b',
        "a\\(b\\) c",
        "(a b,c . d)1.3 e",
        "café näive 東京 (東京 駅)1.1",
        '("a b", "c d").and(1,0.5)',
        '("a b c d", "b").blend(1,1, no_normalize)',
        " \ue000 a b",
        "a=b c, d.e f",
        "",
        " ",
    ],
)
def test_prompts_that_people_write(text: str) -> None:
    assert outcome(lambda words: parse(words, "prompt"), text) == outcome(COMPEL.parse_conjunction, text)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14))
def test_any_prompt(parts: list[str]) -> None:
    text = "".join(parts)
    assert outcome(lambda words: parse(words, "prompt"), text) == outcome(COMPEL.parse_conjunction, text)
