"""Write the changes of other algorithms as low-rank factors: exact, not fitted.

Names are LyCORIS' (Yeh et al., 2309.14859). Everything is computed in float32, whatever a file holds.
"""

from __future__ import annotations

import numpy as np

from scumble_registry.formats.safetensors_header import Array

MAX_COLUMNS = 128
"""Products with more columns than this are merged into weights, because factors in a row would be larger."""


def as_float32(values: Array) -> Array:
    return np.asarray(values, dtype=np.float32)


def tucker(down: Array, mid: Array) -> Array:
    """Fold the 1×1 convolution down (r, in[, 1, 1]) into mid (s, r, k, k) after it; return (s, in, k, k)."""
    folded: Array = np.einsum(
        "srxy,ri->sixy", as_float32(mid), as_float32(down).reshape(down.shape[0], -1), optimize=True
    )
    return folded


def hadamard_factors(up1: Array, down1: Array, up2: Array, down2: Array) -> tuple[Array, Array]:
    """Return U, D of (u₁ d₁) ∘ (u₂ d₂) = U D: Khatri–Rao products U (out, r·s) by rows and D (r·s, in) by columns.

    >>> u, d = hadamard_factors(np.array([[2.0]]), np.array([[3.0]]), np.array([[5.0]]), np.array([[7.0]]))
    >>> (u @ d).item()
    210.0
    """
    up = np.einsum("or,os->ors", as_float32(up1), as_float32(up2)).reshape(len(up1), -1)
    down = np.einsum("ri,si->rsi", as_float32(down1), as_float32(down2)).reshape(-1, down1.shape[1])
    return up, down


def kronecker_factors(up1: Array, down1: Array, up2: Array, down2: Array) -> tuple[Array, Array]:
    """Return the factors of (u₁ d₁) ⊗ (u₂ d₂) = (u₁ ⊗ u₂) (d₁ ⊗ d₂), with d₂ (s, q[, k, k]), for each tap alone.

    >>> u, d = kronecker_factors(np.array([[2.0]]), np.array([[3.0]]), np.array([[5.0]]), np.array([[7.0]]))
    >>> (u @ d).item()
    210.0
    """
    flat = as_float32(down2).reshape(*down2.shape[:2], -1)
    mixed = np.einsum("rm,sqt->rsmqt", as_float32(down1), flat)
    rows, columns = len(down1) * len(down2), down1.shape[1] * down2.shape[1]
    return np.kron(as_float32(up1), as_float32(up2)), mixed.reshape(rows, columns, *down2.shape[2:])


def identity_factors(matrix: Array) -> tuple[Array, Array]:
    """Return a matrix (rows, columns[, k, k]) as a product with the identity on its shorter side (a kernel's: rows)."""
    if matrix.ndim == 2 and matrix.shape[1] < matrix.shape[0]:
        return as_float32(matrix), np.eye(matrix.shape[1], dtype=np.float32)
    return np.eye(len(matrix), dtype=np.float32), as_float32(matrix)


def fit_row(columns: int, shape: tuple[int, ...]) -> bool:
    """Return whether factors with so many columns are no larger than the weight, and at most MAX_COLUMNS."""
    out, into = shape[0], int(np.prod(shape[1:]))
    return columns <= MAX_COLUMNS and columns * (out + into) <= out * into


def tucker_factors(mid: Array, up: Array, down: Array) -> tuple[Array, Array]:
    """Return factors (out, r), (r, in, k, k) of LoHa's and LoKr's mid (r, s, k, k), up **(r, out)**, down (s, in)."""
    return as_float32(up).T, tucker(down, mid)
