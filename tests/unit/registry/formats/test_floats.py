"""NaN and Inf are found by their bits, in every width, as numpy finds them by value."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scumble_registry.formats.floats import is_finite, largest

KINDS = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def of_bits(kind: np.dtype[Any], words: list[int]) -> NDArray[Any]:
    unsigned = np.dtype(f"u{kind.itemsize}")
    return np.array([word % 2 ** (8 * kind.itemsize) for word in words], unsigned).view(kind)


@given(kind=st.sampled_from(KINDS), words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8))
def test_any_bits_are_judged_as_their_value_is(kind: np.dtype[Any], words: list[int]) -> None:
    values = of_bits(kind, words)
    wide = values.astype(np.float64)
    assert is_finite(values) == bool(np.isfinite(wide).all())
    assert np.array_equal(largest(values.reshape(1, -1), 1), [np.abs(wide).max()], equal_nan=True)
    assert np.array_equal(largest(values.reshape(-1, 1), 1), np.abs(wide), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 262_143, 262_144, 600_000])
def test_one_bad_value_among_many_is_found(kind: np.dtype[Any], place: int) -> None:
    values = np.zeros((2, 300_001), kind)
    assert is_finite(values)
    values.reshape(-1)[place] = -np.inf
    assert not is_finite(values)


def test_nothing_is_finite_and_whole_numbers_are() -> None:
    assert is_finite(np.empty((0, 3), np.float16))
    assert is_finite(np.arange(3))
    assert not is_finite(np.array([np.nan], np.float64))
