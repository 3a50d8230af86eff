"""Decodes latents tile by tile, for large pictures in little memory.

Every tile has the same size, also at the edges, where it reaches back instead of being cut: engines take no smaller
ones, and a decoder sees more around what it draws. Where tiles overlap, one fades into the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25
"""Share of a tile that the next one covers too, as in diffusers."""


def decode_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, side: int) -> Tensor:
    """Decode latents `(n, C, h, w)` to `(n, 3, H, W)` in tiles of `side` latents, or less where they have fewer."""
    height, width = (min(side, size) for size in latents.shape[2:])
    total = weights = torch.empty(0)
    for top in _starts(latents.shape[2], height):
        for left in _starts(latents.shape[3], width):
            tile = decode(latents[:, :, top : top + height, left : left + width])
            scale = tile.shape[2] // height
            if not total.numel():
                total = tile.new_zeros(*tile.shape[:2], latents.shape[2] * scale, latents.shape[3] * scale)
                weights = torch.zeros_like(total[:1, :1])
            where = (..., slice(top * scale, (top + height) * scale), slice(left * scale, (left + width) * scale))
            weight = _ramp(tile.shape[2]).to(tile)[:, None] * _ramp(tile.shape[3]).to(tile)
            total[where] += tile * weight
            weights[where] += weight
    return total / weights


def _starts(size: int, tile: int) -> list[int]:
    """Where tiles begin: the last one ends where the picture does."""
    return [*range(0, size - tile, max(int(tile * (1 - OVERLAP)), 1)), size - tile]


def _ramp(size: int) -> Tensor:
    """Weights `(size,)` that rise at the beginning and fall at the end, over what tiles share."""
    places = torch.arange(size) + 0.5
    return torch.minimum(torch.minimum(places, size - places) / (size * OVERLAP), torch.ones(size))
