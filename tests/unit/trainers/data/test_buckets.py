"""Sizes to train at: of one area, and the nearest in shape."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from scumble_trainers.data.buckets import LONGEST, bucket_sizes, choose_sizes
from scumble_trainers.data.dataset import Example

sides = st.integers(1, 4000)
grids = st.tuples(st.sampled_from([8, 16, 32, 64]), st.integers(1, 16)).map(lambda pair: (pair[0], pair[0] * pair[1]))


def picture(width: int, height: int) -> Example:
    return Example(f"{width}x{height}", Path(), ("a",), "", (width, height))


@given(grids)
def test_sizes_are_multiples_of_one_area_and_the_same_lying_and_standing(grid: tuple[int, int]) -> None:
    multiple, resolution = grid
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert 0 < width * height <= resolution**2
        assert max(width, height) <= LONGEST * min(width, height)
        assert (height, width) in sizes


@given(grids, sides, sides)
def test_a_picture_gets_the_size_of_the_nearest_shape(grid: tuple[int, int], width: int, height: int) -> None:
    multiple, resolution = grid
    (chosen,) = choose_sizes([picture(width, height)], resolution, multiple, bucket=True)
    (turned,) = choose_sizes([picture(height, width)], resolution, multiple, bucket=True)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    assert distance(chosen) <= min(map(distance, bucket_sizes(resolution, multiple))) + 1e-9
    assert math.isclose(distance(chosen), distance(turned[::-1]), abs_tol=1e-9)


def test_sd_15s_sizes() -> None:
    """NovelAI's for 512 and 64, as far as they are at most twice as long as wide."""
    assert {(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)} <= set(bucket_sizes(512, 64))


def test_without_bucketing_all_are_square() -> None:
    assert choose_sizes([picture(100, 50), picture(50, 100)], 64, 8, bucket=False) == [(64, 64), (64, 64)]
