"""Weights rotated by orthogonal blocks: OFT (Qiu et al., 2306.07280) and BOFT (Liu et al., 2311.06243).

A file holds skew-symmetric blocks, which Cayley's transform turns into rotations. A record holds the rotations,
(m, n, b, b), so that only reading depends on the tool that wrote the file. With one stage, a block of rows becomes
W'ᵢ = Mᵢ Wᵢ, a block of columns W'ᵢ = Wᵢ Mᵢ. With several (BOFT, rows only), stage i shuffles rows so that those 2ⁱ·b/2
apart are neighbours, and shuffles back after it.
"""

from __future__ import annotations

import numpy as np

from scumble_registry.formats.safetensors_header import Array


def cayley(skew: Array, limit: float | None = None) -> Array:
    """Return (I + Q)(I − Q)⁻¹ for Q = skew − skewᵀ (…, b, b).

    Q is first scaled down to the Frobenius norm `limit`, taken over all blocks together.
    """
    wide = np.asarray(skew, dtype=np.float64)
    q = wide - wide.swapaxes(-1, -2)
    norm = float(np.linalg.norm(q))
    if limit is not None and norm > limit:
        q = q * (limit / norm)
    one = np.eye(q.shape[-1])
    return np.asarray((one + q) @ np.linalg.inv(one - q), dtype=np.float32)


def packed_skew(values: Array, block: int) -> Array:
    """Return antisymmetric blocks (n, b, b) from their upper triangles, row by row (n, b(b−1)/2)."""
    skew = np.zeros((len(values), block, block))
    rows, columns = np.triu_indices(block, 1)
    skew[:, rows, columns] = np.asarray(values, dtype=np.float64)
    return skew - skew.swapaxes(1, 2)


def neumann(skew: Array, terms: int) -> Array:
    """Return PEFT's approximation of Cayley's transform of antisymmetric blocks (n, b, b): I + 2Q + 2Q² + … + Qᵗ⁻¹.

    With more than two terms the series goes at least to Q³.
    """
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    power = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape)
    total = power.copy()
    for exponent in range(1, last + 1):
        power = power @ skew
        total += power * (1 if terms > 2 and exponent == last else 2)
    return np.asarray(total, dtype=np.float32)


def unshuffled(blocks: Array) -> Array:
    """Return the only stage (1, n, b, b) of a butterfly, which shuffles the rows of each block, without the shuffle."""
    order = np.arange(blocks.shape[-1]).reshape(-1, 2).T.reshape(-1)
    return np.ascontiguousarray(blocks[..., order[:, None], order[None, :]])
