"""Products as factors, rotations as rotations: laws, for any numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scumble_registry.formats.lora import algebra
from scumble_registry.formats.lora.rotation import cayley, neumann, packed_skew, unshuffled

VALUES = st.floats(-2, 2, width=16)
SIZE = st.integers(1, 4)


def arrays(*shape: int) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float32, shape, elements=VALUES)


@st.composite
def pair(draw: st.DrawFn, rows: int, columns: int, kernel: tuple[int, ...] = ()) -> tuple[Any, Any]:
    rank = draw(SIZE)
    return draw(arrays(rows, rank)), draw(arrays(rank, columns, *kernel))


@given(data=st.data(), rows=SIZE, columns=SIZE)
def test_a_hadamard_product_of_products_is_one_product(data: st.DataObject, rows: int, columns: int) -> None:
    (up1, down1), (up2, down2) = data.draw(pair(rows, columns)), data.draw(pair(rows, columns))
    up, down = algebra.hadamard_factors(up1, down1, up2, down2)
    assert up.shape[1] == up1.shape[1] * up2.shape[1]
    np.testing.assert_allclose(up @ down, (up1 @ down1) * (up2 @ down2), atol=1e-3)


@given(data=st.data(), left=st.tuples(SIZE, SIZE), right=st.tuples(SIZE, SIZE), side=st.sampled_from([0, 1, 3]))
def test_a_kronecker_product_of_products_is_one_product(
    data: st.DataObject, left: tuple[int, int], right: tuple[int, int], side: int
) -> None:
    kernel = (side, side) if side else ()
    (up1, down1), (up2, down2) = data.draw(pair(*left)), data.draw(pair(*right, kernel))
    up, down = algebra.kronecker_factors(up1, down1, up2, down2)
    second = np.einsum("or,r...->o...", up2, down2)
    expected = np.kron((up1 @ down1).reshape(*left, *(1,) * len(kernel)), second)
    np.testing.assert_allclose(np.einsum("or,r...->o...", up, down), expected, atol=1e-3)


@given(data=st.data(), rows=SIZE, columns=SIZE)
def test_any_matrix_is_a_product_with_its_shorter_side(data: st.DataObject, rows: int, columns: int) -> None:
    matrix = data.draw(arrays(rows, columns))
    up, down = algebra.identity_factors(matrix)
    assert up.shape[1] == min(rows, columns)
    np.testing.assert_array_equal(up @ down, matrix)


@given(data=st.data(), rank=SIZE, inner=SIZE, channels=SIZE, side=st.sampled_from([1, 2, 3]))
def test_a_narrow_convolution_behind_a_1x1_one_is_one_convolution(
    data: st.DataObject, rank: int, inner: int, channels: int, side: int
) -> None:
    torch = pytest.importorskip("torch")
    down, mid = data.draw(arrays(inner, channels, 1, 1)), data.draw(arrays(rank, inner, side, side))
    picture = data.draw(arrays(1, channels, 4, 4))
    conv = torch.nn.functional.conv2d
    both = conv(conv(torch.tensor(picture), torch.tensor(down)), torch.tensor(mid))
    np.testing.assert_allclose(conv(torch.tensor(picture), torch.tensor(algebra.tucker(down, mid))), both, atol=1e-2)


@given(data=st.data(), count=SIZE, size=SIZE, limit=st.one_of(st.none(), st.floats(0, 2)))
def test_cayleys_transform_turns_and_does_not_stretch(
    data: st.DataObject, count: int, size: int, limit: float | None
) -> None:
    skew = data.draw(arrays(count, size, size))
    turned = cayley(skew, limit)
    one = np.broadcast_to(np.eye(size), turned.shape)
    np.testing.assert_allclose(turned @ turned.swapaxes(1, 2), one, atol=1e-4)
    if limit == 0:
        np.testing.assert_allclose(turned, one, atol=1e-6)


@given(data=st.data(), count=SIZE, size=st.integers(2, 5))
def test_a_long_series_is_cayleys_transform_of_small_angles(data: st.DataObject, count: int, size: int) -> None:
    packed = 0.05 * data.draw(arrays(count, size * (size - 1) // 2))
    skew = packed_skew(packed, size)
    np.testing.assert_array_equal(skew, -skew.swapaxes(1, 2))
    np.testing.assert_allclose(neumann(skew, 40), cayley(skew / 2), atol=1e-4)


@given(data=st.data(), half=SIZE, count=SIZE)
def test_a_shuffle_within_blocks_can_be_taken_into_them(data: st.DataObject, half: int, count: int) -> None:
    size = 2 * half
    blocks, rows = data.draw(arrays(1, count, size, size)), data.draw(arrays(count * size, 3))
    shuffled = rows.reshape(count, 2, half, 3).swapaxes(1, 2).reshape(count, size, 3)
    mixed = (blocks[0] @ shuffled).reshape(count, half, 2, 3).swapaxes(1, 2).reshape(count * size, 3)
    np.testing.assert_allclose((unshuffled(blocks)[0] @ rows.reshape(count, size, 3)).reshape(-1, 3), mixed, atol=1e-3)
