"""What other algorithms of the family say, as factors of low rank: exact, not fitted.

Names are LyCORIS' (Yeh et al., 2309.14859). Everything is computed in float32, whatever a file holds.
"""

from __future__ import annotations

import numpy as np

from scumble_registry.formats.safetensors_header import Array

MAX_COLUMNS = 128
"""Products that need more columns than this are merged into weights instead: a row would carry more than they are."""


def wide(values: Array) -> Array:
    return np.asarray(values, dtype=np.float32)


def tucker(down: Array, mid: Array) -> Array:
    """down (r, in[, 1, 1]), mid (s, r, k, k) → (s, in, k, k): the 1×1 convolution before a k×k one folded into it."""
    folded: Array = np.einsum("srxy,ri->sixy", wide(mid), wide(down).reshape(down.shape[0], -1), optimize=True)
    return folded


def hadamard_factors(up1: Array, down1: Array, up2: Array, down2: Array) -> tuple[Array, Array]:
    """(u₁ d₁) ∘ (u₂ d₂) = U D with U (out, r·s) the row-wise, D (r·s, in) the column-wise Khatri–Rao product.

    >>> u, d = hadamard_factors(np.array([[2.0]]), np.array([[3.0]]), np.array([[5.0]]), np.array([[7.0]]))
    >>> (u @ d).item()
    210.0
    """
    up = np.einsum("or,os->ors", wide(up1), wide(up2)).reshape(len(up1), -1)
    down = np.einsum("ri,si->rsi", wide(down1), wide(down2)).reshape(-1, down1.shape[1])
    return up, down


def kronecker_factors(up1: Array, down1: Array, up2: Array, down2: Array) -> tuple[Array, Array]:
    """(u₁ d₁) ⊗ (u₂ d₂) = (u₁ ⊗ u₂) (d₁ ⊗ d₂), with d₂ (s, q[, k, k]), whose taps stay apart.

    >>> u, d = kronecker_factors(np.array([[2.0]]), np.array([[3.0]]), np.array([[5.0]]), np.array([[7.0]]))
    >>> (u @ d).item()
    210.0
    """
    flat = wide(down2).reshape(*down2.shape[:2], -1)
    mixed = np.einsum("rm,sqt->rsmqt", wide(down1), flat)
    rows, columns = len(down1) * len(down2), down1.shape[1] * down2.shape[1]
    return np.kron(wide(up1), wide(up2)), mixed.reshape(rows, columns, *down2.shape[2:])


def halves(matrix: Array) -> tuple[Array, Array]:
    """Any matrix (rows, columns[, k, k]) as a product, with the identity on its shorter side (a kernel's: its rows)."""
    if matrix.ndim == 2 and matrix.shape[1] < matrix.shape[0]:
        return wide(matrix), np.eye(matrix.shape[1], dtype=np.float32)
    return np.eye(len(matrix), dtype=np.float32), wide(matrix)


def worth_it(columns: int, shape: tuple[int, ...]) -> bool:
    """Are factors of this many columns smaller than the weight itself, and few enough for a row?"""
    out, into = shape[0], int(np.prod(shape[1:]))
    return columns <= MAX_COLUMNS and columns * (out + into) <= out * into


def tucker_halves(mid: Array, up: Array, down: Array) -> tuple[Array, Array]:
    """LoHa's and LoKr's convolutions: mid (r, s, k, k), up **(r, out)**, down (s, in) → (out, r), (r, in, k, k)."""
    return wide(up).T, tucker(down, mid)
