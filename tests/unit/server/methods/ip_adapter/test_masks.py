"""Areas are diffusers' own masks, wherever diffusers guesses a level's size right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from torch.nn.functional import interpolate

from scumble_build.graphs.inputs import level_sizes
from scumble_server.methods.ip_adapter.masks import area


def mask(width: int, height: int) -> np.ndarray:
    """A disc with soft edges, off the middle."""
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot((x - 0.3 * width) / width, (y - 0.6 * height) / height)
    return np.repeat((255 * np.clip(1.5 - 4 * distance, 0, 1)).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("given", [(64, 64), (200, 120), (33, 47)])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 128), (512, 768)])
def test_equal_to_diffusers(width: int, height: int, given: tuple[int, int]) -> None:
    pixels = mask(*given)
    prepared = IPAdapterMaskProcessor().preprocess([Image.fromarray(pixels)], height=height, width=width)
    ours = area(pixels, width, height, vae_scale=8, levels=3)
    start = 0
    for level in range(3):
        positions = (height // 8 >> level) * (width // 8 >> level)
        theirs = IPAdapterMaskProcessor.downsample(prepared[0], 1, positions, 1)[0, :, 0]
        assert torch.equal(ours[start : start + positions], theirs)
        start += positions
    assert start == len(ours)


def test_odd_sides_keep_their_shape() -> None:
    """5 x 12 latents: diffusers takes the second level's 3 x 6 positions for 2 x 9."""
    pixels = np.zeros((40, 96, 3), np.uint8)
    pixels[:, 48:] = 255
    second = area(pixels, 96, 40, vae_scale=8, levels=2)[60:].view(3, 6)
    assert second[:, 0].abs().max() < 0.1
    assert (second[:, -1] - 1).abs().max() < 0.1
    assert torch.allclose(second, second[:1].expand(3, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "level", "theirs"),
    [(480, 288, 3, (4, 10)), (256, 264, 1, (16, 17)), (1152, 448, 3, (6, 21))],
)
def test_where_diffusers_guesses_wrong_the_docs_say_so(
    width: int, height: int, level: int, theirs: tuple[int, int]
) -> None:
    pixels = mask(64, 64)
    prepared = IPAdapterMaskProcessor().preprocess([Image.fromarray(pixels)], height=height, width=width)
    sizes = level_sizes(height // 8, width // 8, 4)
    start = sum(h * w for h, w in sizes[:level])
    positions = sizes[level][0] * sizes[level][1]
    ours = area(pixels, width, height, vae_scale=8, levels=4)[start : start + positions]
    guessed = IPAdapterMaskProcessor.downsample(prepared[0], 1, positions, 1)[0, :, 0]
    sheared = interpolate(prepared[:1], size=theirs, mode="bicubic").flatten()
    assert torch.allclose(guessed[: len(sheared)], sheared[:positions])
    assert torch.equal(ours, interpolate(prepared[:1], size=sizes[level], mode="bicubic").flatten())
    assert (ours - guessed).abs().max() > 0.5


def test_alpha_is_left_out() -> None:
    pixels = mask(64, 64)
    see_through = np.concatenate([pixels, np.zeros((64, 64, 1), np.uint8)], -1)
    assert torch.equal(area(see_through, 64, 64, 8, 2), area(pixels, 64, 64, 8, 2))
