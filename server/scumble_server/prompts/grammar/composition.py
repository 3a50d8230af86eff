"""AND: several prompts that steer one picture, each with its weight (Liu et al., 2206.01714)."""

from __future__ import annotations

import re
from typing import NamedTuple

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


class PromptPart(NamedTuple):
    """One of the prompts that AND joins."""

    text: str
    weight: float


def parse_composition(prompt: str) -> list[PromptPart]:
    """At least one part. Spaces behind a part's text are left out, those before it stay.

    >>> parse_composition("a cat :1.2 AND a dog")
    [PromptPart(text='a cat', weight=1.2), PromptPart(text=' a dog', weight=1.0)]
    """
    return [_part(text) for text in _AND.split(prompt)]


def _part(text: str) -> PromptPart:
    before, colon, weight = text.rpartition(":")
    if colon and _WEIGHT.fullmatch(weight.strip()):
        return PromptPart(before.rstrip(), float(weight))
    return PromptPart(text.rstrip(), 1.0)
