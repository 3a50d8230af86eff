"""Long prompts: tokens in chunks of what the text encoder reads at once, each between a BOS and an EOS of its own.

Serving reads prompts and trainers read captions in this way.

As the webui does it: a chunk that is full ends behind its last comma, if that is near enough; BREAK ends a chunk; an
embedding is never split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

MAX_CHUNKS = 8
"""Longer prompts are refused."""
BACKTRACK = 20
"""The webui's own: so many tokens behind a comma at most go over to the next chunk."""


class Break(Enum):
    """Here the chunk ends, however full it is."""

    BREAK = "BREAK"


@dataclass(frozen=True, slots=True)
class Unit:
    """A token, or an embedding whose vectors take `width` places (`id` is then a filler). Never split."""

    id: int
    weight: float = 1.0
    width: int = 1
    embedding: int | None = None
    is_comma: bool = False


def chunked(units: Iterable[Unit | Break], size: int, backtrack: int = 0) -> list[list[Unit]]:
    """Chunks of at most `size` places, one at least; no unit is wider than that."""
    chunks = _Chunks(size, backtrack)
    for unit in units:
        if isinstance(unit, Break):
            chunks.end()
        else:
            chunks.add(unit)
    return chunks.done()


class _Chunks:
    """Chunks that are done, and one that fills. `_comma` is where its last comma stands: its index, and its place."""

    def __init__(self, size: int, backtrack: int) -> None:
        self._size, self._backtrack = size, backtrack
        self._done: list[list[Unit]] = []
        self._chunk: list[Unit] = []
        self._comma: tuple[int, int] | None = None

    def add(self, unit: Unit) -> None:
        filled = _places(self._chunk)
        if unit.is_comma:
            self._comma = len(self._chunk), filled
        elif filled == self._size and self._comma is not None and filled - self._comma[1] <= self._backtrack:
            behind = self._comma[0] + 1
            moved = self._chunk[behind:]
            del self._chunk[behind:]
            self.end()
            self._chunk = moved
        if _places(self._chunk) + unit.width > self._size:
            self.end()
        self._chunk.append(unit)

    def end(self) -> None:
        self._done.append(self._chunk)
        self._chunk, self._comma = [], None

    def done(self) -> list[list[Unit]]:
        if self._chunk or not self._done:
            self.end()
        return self._done


def _places(units: Sequence[Unit]) -> int:
    return sum(unit.width for unit in units)
