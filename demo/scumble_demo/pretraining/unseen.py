"""The held-out renderings on which the scorer is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scumble_demo.emoji.concepts import STYLES, concepts

SEED, COUNT = 7, 80


@dataclass(frozen=True, slots=True)
class UnseenPair:
    """A picture's position in the gallery."""

    row: int
    style: int


def unseen_pairs(seed: int = SEED, count: int = COUNT) -> tuple[UnseenPair, ...]:
    """Return one style each of `count` concepts; the other styles of these concepts are in the training data."""
    order = np.random.default_rng(seed)
    rows = order.choice(len(concepts()), size=min(count, len(concepts())), replace=False)
    return tuple(UnseenPair(int(row), int(order.integers(len(STYLES)))) for row in sorted(rows))
