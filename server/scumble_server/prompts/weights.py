"""How strongly words may act, in every grammar."""

from __future__ import annotations

from scumble.errors import InvalidRequest
from scumble.request import MAX_WEIGHT

_SHOWN = 40
"""Characters of the words in a message."""


def check_weight(weight: float, words: str, field: str) -> None:
    """Raises InvalidRequest for a weight of words that is no number between -MAX_WEIGHT and MAX_WEIGHT."""
    if not abs(weight) <= MAX_WEIGHT:
        shown = words.strip()
        shown = f"{shown[:_SHOWN]}…" if len(shown) > _SHOWN else shown
        raise InvalidRequest(
            f"{field}: {shown!r} has the weight {weight:g}; between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g} can be read, "
            "and more than 2 seldom helps",
            field=field,
        )
