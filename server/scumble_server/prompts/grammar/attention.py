"""Emphasis: `(word)`, `[word]`, `(word:1.3)`, escapes, and BREAK.

Brackets that are never closed act to the end of the text; those that were never opened are text.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple, TypeAlias

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
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Span(NamedTuple):
    """Neighbouring words of one weight."""

    text: str
    weight: float


class Break(Enum):
    """Here the chunk ends, however full it is."""

    BREAK = "BREAK"


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
    """Pieces so far, and where each open bracket stands among them."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._open: dict[str, list[int]] = {"(": [], "[": []}

    def add(self, text: str) -> None:
        self._pieces.append(Span(text, 1.0))

    def words(self, text: str) -> None:
        for i, part in enumerate(_BREAK.split(text)):
            if i:
                self._pieces.append(Break.BREAK)
            self.add(part)

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
        return _merged(self._pieces)

    def _close(self, sign: str, factor: float) -> bool:
        if not self._open[sign]:
            return False
        for i in range(self._open[sign].pop(), len(self._pieces)):
            piece = self._pieces[i]
            if isinstance(piece, Span):
                self._pieces[i] = Span(piece.text, piece.weight * factor)
        return True


def _merged(pieces: list[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in pieces or [Span("", 1.0)]:
        last = merged[-1] if merged else None
        if isinstance(piece, Span) and isinstance(last, Span) and piece.weight == last.weight:
            merged[-1] = Span(last.text + piece.text, last.weight)
        else:
            merged.append(piece)
    return merged
