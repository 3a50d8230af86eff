"""What an image begins with: noise alone, or an original, of which a mask may keep a part.

Whatever is drawn at random is drawn in the order of diffusers' own pipelines, so that the same seed gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scumble_server.denoise.image import Image, MaskedOriginal
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.schedulers import Table
from scumble_server.executors.protocol import LatentDistribution


@dataclass(frozen=True, slots=True, eq=False)
class OriginalLatents:
    """The original of one request, on the executor's device, shared by its images.

    `picture` and `masked_picture`, what of it is kept, are latents; mask `(1, H/8, W/8)`, 1 where the image is drawn
    anew.
    """

    picture: LatentDistribution
    mask: Tensor | None = None
    masked_picture: LatentDistribution | None = None
    pure_noise: bool = False
    """The schedule begins with noise alone, though a mask keeps a part of the picture."""
    inpaints: bool = False
    """The UNet itself reads mask and masked picture, in channels of its own."""


def start_from(image: Image, original: OriginalLatents | None) -> None:
    """Give an image its first sample, and what it keeps of the original."""
    noise, table, device = image.noise, image.table, image.sample.device
    if original is None:
        image.sample = noise.draw().to(device) * table.init_sigma
        return
    picture = None
    if not (original.inpaints and original.pure_noise):
        picture = _sample(original.picture, noise)
    fresh = noise.draw().to(device)
    image.sample = _noised(picture, fresh, table) if not original.pure_noise else fresh * table.init_sigma
    if original.mask is not None and original.masked_picture is not None:
        masked = _sample(original.masked_picture, noise)  # drawn even where it is not read
        if original.inpaints:
            image.inpaint_channels = torch.cat([original.mask, masked])
        else:
            assert picture is not None
            image.original = MaskedOriginal(picture, fresh, original.mask)


def _noised(picture: Tensor | None, fresh: Tensor, table: Table) -> Tensor:
    assert picture is not None
    of_picture, of_noise = table.noised[0].tolist()
    sample: Tensor = of_picture * picture + of_noise * fresh
    return sample


def _sample(latents: LatentDistribution, noise: Noise) -> Tensor:
    return latents.mean + latents.deviation * noise.draw().to(latents.mean)
