"""Texts that change from step to step: `[from:to:when]` and `[a|b]`.

`when` is a fraction of the steps if it is written with a point, else a number of steps. `[to:when]` comes in,
`[from::when]` goes; `[a|b]` alternates. What is nested in one of them is read alike.

Brackets that are nothing of the kind stay as they are, for `attention.py`. A `|` outside of brackets, or a backslash
with nothing behind it, makes all of the prompt plain text; within `[…:when]` a `|` is a sign like others.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple, TypeAlias

_DEEPEST = 64
"""Brackets nested deeper than this are text."""
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_BRACKET = re.compile(r"\\.|[\[\]()]", re.DOTALL)
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
    timed = _timed(tree, steps)
    changes, period = sorted(_changes(timed)), _period(timed)
    ends = range(1, steps + 1) if period > 1 else sorted({steps, *changes} - {0})
    texts: dict[tuple[int, int], str] = {}  # between two changes, texts come again after `period` steps
    untils = []
    for step in ends:
        key = bisect_left(changes, step), step % period
        if key not in texts:
            texts[key] = _at(timed, step)
        untils.append(Until(step, texts[key]))
    return untils


def texts_by_step(prompt: str, steps: int) -> list[str]:
    """One text a step."""
    texts: list[str] = []
    for until in parse_schedule(prompt, steps):
        texts += [until.text] * (until.step - len(texts))
    return texts


class _ChangeAt(NamedTuple):
    """A change once the number of steps is known: `before` up to and with step `last`."""

    last: int
    before: _Timed
    after: _Timed


class _Cycle(NamedTuple):
    """An alternation once the number of steps is known."""

    options: tuple[_Timed, ...]


_Timed: TypeAlias = "str | tuple[str | _ChangeAt | _Cycle, ...]"


def _timed(tree: _Tree, steps: int) -> _Timed:
    """Work out what needs no step: when changes happen, and text in which nothing does."""
    nodes: list[str | _ChangeAt | _Cycle] = []
    for node in tree:
        if isinstance(node, str):
            nodes.append(node)
        elif isinstance(node, _Change):
            nodes.append(_ChangeAt(node.step(steps), _timed(node.before, steps), _timed(node.after, steps)))
        else:
            nodes.append(_Cycle(tuple(_timed(option, steps) for option in node.options)))
    texts = [node for node in nodes if isinstance(node, str)]
    return "".join(texts) if len(texts) == len(nodes) else tuple(nodes)


def _changes(timed: _Timed) -> set[int]:
    """The steps behind which something changes, in a part that is drawn or not; 0 for what never was."""
    changes: set[int] = set()
    for node in timed if isinstance(timed, tuple) else ():
        if isinstance(node, _ChangeAt):
            changes |= {node.last} | _changes(node.before) | _changes(node.after)
        elif isinstance(node, _Cycle):
            changes = changes.union(*map(_changes, node.options))
    return changes


def _period(timed: _Timed) -> int:
    """The number of steps after which all alternations are where they were; 1 without any."""
    periods = [1]
    for node in timed if isinstance(timed, tuple) else ():
        if isinstance(node, _Cycle):
            periods += [len(node.options), *map(_period, node.options)]
        elif isinstance(node, _ChangeAt):
            periods += [_period(node.before), _period(node.after)]
    return lcm(*periods)


def _at(timed: _Timed, step: int) -> str:
    """The text at a step, counted from 1."""
    if isinstance(timed, str):
        return timed
    parts = []
    for node in timed:
        part: _Timed = (
            node
            if isinstance(node, str)
            else (node.before if step <= node.last else node.after)
            if isinstance(node, _ChangeAt)
            else node.options[(step - 1) % len(node.options)]
        )
        parts.append(part if isinstance(part, str) else _at(part, step))
    return "".join(parts)


def _parse(prompt: str) -> _Tree:
    """Brackets that do not fit together are text out here, and nowhere else. Raises _NotThisGrammarError."""
    nodes: list[str | _Change | _Alternation] = []
    position, closing = 0, _closing(prompt)
    while position < len(prompt):
        if plain := _PLAIN.match(prompt, position):
            nodes.append(plain[0])
            position = plain.end()
        elif position in closing and (bracket := _bracket(prompt, position, 0)) is not None:
            nodes += bracket[0]
            position = bracket[1]
        elif prompt[position] in "[]():":
            nodes.append(prompt[position])
            position += 1
        else:
            raise _NotThisGrammarError
    return tuple(nodes)


def _closing(prompt: str) -> dict[int, int]:
    """Opening brackets that a bracket of their own sign closes and that are not nested too deep: where they end.

    Only these can be `_bracket`s; to try the others would cost time that grows with the square of the prompt.
    """
    closing: dict[int, int] = {}
    stack: list[tuple[int, int]] = []  # where one opened, and how deep it is nested inside so far
    for sign in _BRACKET.finditer(prompt):
        if sign[0] in _CLOSING:
            stack.append((sign.start(), 0))
        elif sign[0] in _CLOSING.values() and stack:
            start, depth = stack.pop()
            if _CLOSING[prompt[start]] == sign[0] and depth <= _DEEPEST:
                closing[start] = sign.start()
            if stack:
                stack[-1] = stack[-1][0], max(stack[-1][1], depth + 1)
    return closing


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
