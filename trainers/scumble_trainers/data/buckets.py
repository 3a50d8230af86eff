"""Aspect ratio buckets: training sizes of about one area, so that every batch costs the same.

Only pictures of one size can share a batch. The sizes follow NovelAI's aspect ratio bucketing (2022): sides that the
UNet can halve at every level, an area of at most the square's, an aspect ratio of at most 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scumble_trainers.data.dataset import Example

LONGEST = 2.0
"""Largest aspect ratio; longer pictures are cropped."""

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Return all sizes, by rising width; sides are multiples of `multiple`, the square is one of them."""
    area = resolution * resolution
    widths = range(multiple, int(resolution * math.sqrt(LONGEST)) + 1, multiple)
    sizes = {(width, area // width // multiple * multiple) for width in widths}
    sizes |= {(height, width) for width, height in sizes}
    fitting = {size for size in sizes if min(size) > 0 and max(size) <= LONGEST * min(size)}
    return tuple(sorted({*fitting, (resolution, resolution)}))


def choose_sizes(examples: Sequence[Example], resolution: int, multiple: int, *, bucket: bool) -> list[Size]:
    """Return each example's training size: the nearest aspect ratio, or the square without bucketing."""
    sizes = bucket_sizes(resolution, multiple) if bucket else ((resolution, resolution),)
    return [min(sizes, key=lambda size: _distance(size, example.size)) for example in examples]


def _distance(one: Size, other: Size) -> float:
    """Return the distance of two aspect ratios, symmetric for wide and tall."""
    return abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1]))
