"""Parses a compel prompt with compel's own parser, in time that is proportional to what is syntax in it.

compel's parser spends milliseconds on every word, and tries each letter alone. So words without syntax are replaced by
single letters that the prompt does not have, runs of them by one, and are put back into what was parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

from scumble.errors import InvalidRequest

MAX_COST = 300
"""What a prompt's syntax may cost, in thirds of a millisecond: 100 phrases as `(phrase)1.2`, or 300 as `word+`."""
_COSTS = dict.fromkeys("+-0", 1) | dict.fromkeys("(.,=\\", 3) | {'"': 4}
_WEIGHT = re.compile(r"\)[\d.]+")
_SYNTAX = r'()",.+\-=\\'
_PLAIN = rf"[^\s\d_{_SYNTAX}]+"


def _runs(word: str) -> re.Pattern[str]:
    """Whole words with nothing but spaces between, unless an operator follows; else what is plain of a word."""
    return re.compile(rf"(?<![^\s(\"]){word}(?:\s+{word})*(?![^\s)\"])(?!\s*\.)|{_PLAIN}")


_RUNS = _runs(_PLAIN)
_RUNS_WITHOUT_BRACKETS = _runs(r"[^\s+\-\\,]+,?")
"""Outside of brackets and quotes only signs are syntax; compel puts a space behind a comma within a word."""
_LORA = re.compile(r"(?:use|with)Lora\s*\(")
_KEYWORDS = frozenset(
    "attend swap blend and add no normalize s t start end shape freedom".split()  # noqa: SIM905
)
"""Words that mean something to compel in a prompt with an operator; those with an underscore in their parts."""
_OPERATOR = re.compile(r"\.\s*(?:attend|swap|blend|and|add)")


def parse(words: str, field: str) -> Any:
    """Return compel's `Conjunction`. Raises what compel raises, and InvalidRequest for too much syntax."""
    if _LORA.search(words):
        raise InvalidRequest(f"{field}: withLora is not read here; name the LoRA in adapters", field=field)
    has_brackets = re.search(r'[()"]', words) is not None
    keywords = _KEYWORDS if _OPERATOR.search(words) else frozenset[str]()
    letters = _unused_letters(words)
    replaced: dict[str, str] = {}

    def letter_of(match: re.Match[str]) -> str:
        run = " ".join(match[0].split())
        if keywords.intersection(run.split()):
            return match[0]
        if run not in replaced:
            replaced[run] = next(letters)
        return replaced[run]

    pattern = _RUNS if has_brackets else _RUNS_WITHOUT_BRACKETS
    short = pattern.sub(letter_of, words)
    _check_cost(short, field)
    conjunction = _parser().parse_conjunction(short)
    _put_back(conjunction, {ord(letter): run for run, letter in replaced.items()})
    return conjunction


def _check_cost(words: str, field: str) -> None:
    counted = re.sub(r"\d+|[a-z]+", "0", _WEIGHT.sub(")", words))
    cost = sum(_COSTS.get(letter, 0) for letter in counted)
    if cost > MAX_COST:
        raise InvalidRequest(
            f"{field}: has too many brackets, quotes, signs and commas for compel's grammar (they count {cost}, "
            f"at most {MAX_COST}); weight whole phrases instead of words",
            field=field,
        )


def _unused_letters(words: str) -> Iterator[str]:
    """Letters for private use, of which `words` has none."""
    codes = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
    return (letter for code in codes if (letter := chr(code)) not in words)


def _put_back(part: Any, runs: dict[int, str]) -> None:
    """Put the words of every fragment back, in place."""
    if hasattr(part, "text"):
        part.text = part.text.translate(runs)
    for name in ("prompts", "children", "original", "edited"):
        for child in getattr(part, name, ()):
            _put_back(child, runs)


@cache
def _parser() -> Any:
    """Imported when a prompt first asks for it. Without packrat it takes exponential time in open brackets."""
    from compel.prompt_parser import PromptParser
    from pyparsing import ParserElement

    ParserElement.enable_packrat(cache_size_limit=128)  # more costs more than it spares
    return PromptParser()
