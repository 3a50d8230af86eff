"""Sizes that pictures of other shapes than the square are trained at: of one area, so that a batch costs the same.

Only pictures of one size can share a batch. The sizes are those of NovelAI's aspect ratio bucketing (2022): sides
that the UNet can halve as often as it does, area at most that of the square, at most twice as long as wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scumble_trainers.data.dataset import Example

LONGEST = 2.0
"""Most that the long side may be, in short sides; longer pictures are cropped."""

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Every size to choose from, widths rising; sides are multiples of `multiple`, the square is among them."""
    area = resolution * resolution
    widths = range(multiple, int(resolution * math.sqrt(LONGEST)) + 1, multiple)
    sizes = {(width, area // width // multiple * multiple) for width in widths}
    sizes |= {(height, width) for width, height in sizes}
    fitting = {size for size in sizes if min(size) > 0 and max(size) <= LONGEST * min(size)}
    return tuple(sorted({*fitting, (resolution, resolution)}))


def choose_sizes(examples: Sequence[Example], resolution: int, multiple: int, *, bucket: bool) -> list[Size]:
    """The size that each example is trained at: of the nearest aspect, or the square where no bucketing is wanted."""
    sizes = bucket_sizes(resolution, multiple) if bucket else ((resolution, resolution),)
    return [min(sizes, key=lambda size: _distance(size, example.size)) for example in examples]


def _distance(one: Size, other: Size) -> float:
    """Between two aspects, the same for wide and tall."""
    return abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1]))
