"""Tiles: all of one size, the picture whole, and no seam where they meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from scumble_server.executors.tiles import decode_tiles


def enlarge(latents: Tensor) -> Tensor:
    """A decoder that looks at nothing around: any tiling shows the same picture."""
    return interpolate(latents[:, :3], scale_factor=8.0)


@pytest.mark.parametrize(("height", "width", "side"), [(16, 16, 8), (17, 9, 8), (5, 40, 8), (8, 8, 8), (3, 3, 8)])
def test_the_whole_picture_is_there_and_tiles_have_one_size(height: int, width: int, side: int) -> None:
    sizes = set()

    def decode(latents: Tensor) -> Tensor:
        sizes.add(tuple(latents.shape[2:]))
        return enlarge(latents)

    latents = torch.randn(2, 4, height, width)
    assert torch.allclose(decode_tiles(decode, latents, side), enlarge(latents), atol=1e-5)
    assert sizes == {(min(side, height), min(side, width))}


def test_one_tile_fades_into_the_next() -> None:
    shades = iter(range(100))
    picture = decode_tiles(lambda latents: torch.full_like(enlarge(latents), next(shades)), torch.zeros(1, 4, 8, 20), 8)
    jumps = (picture[0, 0, 0, 1:] - picture[0, 0, 0, :-1]).abs()
    assert picture[0, 0, 0, 0] == 0
    assert picture[0, 0, 0, -1] == next(shades) - 1
    assert jumps.max() < 0.1
