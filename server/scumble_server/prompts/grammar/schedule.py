"""Texts that change from step to step: `[from:to:when]` and `[a|b]`.

`when` is a fraction of the steps if it is written with a point, else a number of steps. `[to:when]` comes in,
`[from::when]` goes; `[a|b]` alternates. What is nested in one of them is read alike.

Brackets that are nothing of the kind stay as they are, for `attention.py`. A `|` outside of brackets, or a backslash
with nothing behind it, makes all of the prompt plain text; within `[…:when]` a `|` is a sign like others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

_DEEPEST = 64
"""Brackets nested deeper than this are text."""
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_CLOSING = {"[": "]", "(": ")"}


class Until(NamedTuple):
    """The text up to and with this step, counted from 1."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class _Change:
    before: _Tree
    after: _Tree
    when: str

    def step(self, steps: int) -> int:
        """The last step of `before`; 0 if there is none."""
        value = float(self.when) * (steps if "." in self.when else 1)
        return int(max(0, min(steps, value)))


@dataclass(frozen=True, slots=True)
class _Alternation:
    options: tuple[_Tree, ...]


_Tree: TypeAlias = tuple["str | _Change | _Alternation", ...]


class _NotThisGrammarError(Exception):
    """The prompt is plain text."""


def parse_schedule(prompt: str, steps: int) -> list[Until]:
    """Return the texts of a prompt over `steps` steps, with the step at which each ends.

    >>> parse_schedule("a [cat:dog:.5]", 10)
    [Until(step=5, text='a cat'), Until(step=10, text='a dog')]
    """
    try:
        tree = _parse(prompt)
    except _NotThisGrammarError:
        return [Until(steps, prompt)]
    ends = sorted({steps, *_ends(tree, steps)})
    return [Until(step, _at(tree, step, steps)) for step in ends]


def texts_by_step(prompt: str, steps: int) -> list[str]:
    """One text a step."""
    texts: list[str] = []
    for until in parse_schedule(prompt, steps):
        texts += [until.text] * (until.step - len(texts))
    return texts


def _ends(tree: _Tree, steps: int) -> set[int]:
    """Steps behind which something changes, in a part that is shown or not."""
    ends: set[int] = set()
    for node in tree:
        if isinstance(node, _Alternation):
            ends |= set(range(1, steps + 1))
        elif isinstance(node, _Change):
            ends |= _ends(node.before, steps) | _ends(node.after, steps) | ({node.step(steps)} - {0})
    return ends


def _at(tree: _Tree, step: int, steps: int) -> str:
    parts = []
    for node in tree:
        if isinstance(node, str):
            parts.append(node)
        elif isinstance(node, _Alternation):
            parts.append(_at(node.options[(step - 1) % len(node.options)], step, steps))
        else:
            parts.append(_at(node.before if step <= node.step(steps) else node.after, step, steps))
    return "".join(parts)


def _parse(prompt: str) -> _Tree:
    """Brackets that do not fit together are text out here, and nowhere else. Raises _NotThisGrammarError."""
    nodes: list[str | _Change | _Alternation] = []
    position = 0
    while position < len(prompt):
        if plain := _PLAIN.match(prompt, position):
            nodes.append(plain[0])
            position = plain.end()
        elif (bracket := _bracket(prompt, position, 0)) is not None:
            nodes += bracket[0]
            position = bracket[1]
        elif prompt[position] in "[]():":
            nodes.append(prompt[position])
            position += 1
        else:
            raise _NotThisGrammarError
    return tuple(nodes)


def _bracket(prompt: str, start: int, depth: int) -> tuple[_Tree, int] | None:
    """What the bracket at `start` holds, and where the text goes on; None if there is none, or none of ours."""
    sign = prompt[start]
    if sign not in _CLOSING or depth > _DEEPEST:
        return None
    segments: list[_Tree] = []
    separators: list[str] = []
    position = start + 1
    while True:
        inner = _inner(prompt, position, depth)
        if inner is None:
            return None
        segments.append(inner[0])
        position = inner[1] + 1
        if prompt[inner[1]] == _CLOSING[sign]:
            break
        if prompt[inner[1]] not in ":|":
            return None
        separators.append(prompt[inner[1]])
    tree = _round(segments, separators) if sign == "(" else _square(segments, separators)
    return None if tree is None else (tree, position)


def _inner(prompt: str, position: int, depth: int) -> tuple[_Tree, int] | None:
    """What stands up to the next separator or closing bracket, and where that is; None if the text ends before."""
    nodes: list[str | _Change | _Alternation] = []
    while position < len(prompt) and prompt[position] not in ":|])":
        if plain := _PLAIN.match(prompt, position):
            nodes.append(plain[0])
            position = plain.end()
        elif (bracket := _bracket(prompt, position, depth + 1)) is not None:
            nodes += bracket[0]
            position = bracket[1]
        else:
            return None
    return (tuple(nodes), position) if position < len(prompt) else None


def _round(segments: Sequence[_Tree], separators: Sequence[str]) -> _Tree | None:
    """`(a)` or `(a:1.2)`, which stays as it is around what changes in it."""
    if "|" in separators or len(segments) > 2:
        return None
    return ("(", *_joined(segments, separators), ")")


def _square(segments: Sequence[_Tree], separators: Sequence[str]) -> _Tree | None:
    if not separators:
        return ("[", *segments[0], "]")
    if ":" not in separators:
        return (_Alternation(tuple(segments)),)
    when = _NUMBER.fullmatch(segments[-1][0]) if len(segments[-1]) == 1 and isinstance(segments[-1][0], str) else None
    if when is None or separators[-1] != ":":
        return None
    if ":" not in separators[:-1]:
        return (_Change((), _joined(segments[:-1], separators), when[1]),)
    if separators.count(":") > 2:
        return None
    middle = separators.index(":") + 1
    before, after = _joined(segments[:middle], separators), _joined(segments[middle:-1], separators[middle:])
    return (_Change(before, after, when[1]),)


def _joined(segments: Sequence[_Tree], separators: Sequence[str]) -> _Tree:
    """Segments with what stands between them."""
    nodes = list(segments[0])
    for separator, segment in zip(separators, segments[1:], strict=False):
        nodes += [separator, *segment]
    return tuple(nodes)
