"""Emphasis: `(word)`, `[word]`, `(word:1.3)`, escapes, and BREAK.

Brackets that are never closed act to the end of the text; those that were never opened are text.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple, TypeAlias

import numpy as np

from scumble_build.chunks import Break

ROUND = 1.1
SQUARE = 1 / 1.1

_SIGN = re.compile(
    r"""
    \\(?P<escaped>[\\()\[\]]?)
    | (?P<bracket>[()\[\]])
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | (?P<text>[^\\()\[\]:]+ | :)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


class Span(NamedTuple):
    """Neighbouring words of one weight."""

    text: str
    weight: float


Piece: TypeAlias = Span | Break


def parse_attention(text: str) -> list[Piece]:
    """Split a prompt into pieces with a weight each; an empty text is one span.

    >>> parse_attention("an (important) word")
    [Span(text='an ', weight=1.0), Span(text='important', weight=1.1), Span(text=' word', weight=1.0)]
    """
    reader = _Reader()
    for match in _SIGN.finditer(text):
        if match["escaped"] is not None:
            reader.add(match["escaped"])
        elif match["bracket"] is not None:
            reader.bracket(match["bracket"])
        elif match["weight"] is not None:
            reader.weighted(match[0], match["weight"])
        else:
            reader.words(match["text"])
    return reader.end()


class _Reader:
    """Pieces so far, where each open bracket stands among them, and what closed brackets do to which pieces."""

    def __init__(self) -> None:
        self._pieces: list[str | Break] = []
        self._open: dict[str, list[int]] = {"(": [], "[": []}
        self._closed: list[tuple[int, int, float]] = []

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def words(self, text: str) -> None:
        """Add text without the white space around BREAK."""
        first, *others = _BREAK.split(text)
        for other in others:
            self._pieces += [first.rstrip(), Break.BREAK]
            first = other.lstrip()
        self.add(first)

    def bracket(self, sign: str) -> None:
        if sign in self._open:
            self._open[sign].append(len(self._pieces))
        elif not self._close("(" if sign == ")" else "[", ROUND if sign == ")" else SQUARE):
            self.add(sign)

    def weighted(self, sign: str, weight: str) -> None:
        """`:1.3)`, which is text where nothing is open, or where `1.3` is no number after all."""
        try:
            factor = float(weight)
        except ValueError:
            self.add(sign)
            return
        if not self._close("(", factor):
            self.add(sign)

    def end(self) -> list[Piece]:
        for sign, factor in (("(", ROUND), ("[", SQUARE)):
            while self._close(sign, factor):
                pass
        weights = np.ones(len(self._pieces))
        for start, end, factor in self._closed:  # the inner bracket first, as numbers are rounded there
            weights[start:end] *= factor
        return _merged(
            [
                Span(piece, weight) if isinstance(piece, str) else piece
                for piece, weight in zip(self._pieces, weights.tolist(), strict=True)
            ]
        )

    def _close(self, sign: str, factor: float) -> bool:
        if not self._open[sign]:
            return False
        self._closed.append((self._open[sign].pop(), len(self._pieces), factor))
        return True


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Join neighbouring spans of one weight."""
    merged: list[Piece] = []
    for weight, group in groupby(pieces or [Span("", 1.0)], lambda piece: getattr(piece, "weight", None)):
        if weight is None:
            merged += group
        else:
            merged.append(Span("".join(piece.text for piece in group if isinstance(piece, Span)), weight))
    return merged
