"""Previews: latents to small pictures by a linear map, without the VAE.

The map is fitted to the base's own VAE when the base is loaded: smooth random latents are decoded once, and least
squares finds the colour that each latent stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from scumble.events import Preview

_SAMPLES, _SIDE, _PATCH = 16, 8, 4


@dataclass(frozen=True, slots=True)
class LatentColours:
    """weights `(C + 1, 3)`: red, green and blue, 0 to 255, of each latent channel, and at last what is added."""

    weights: Tensor

    def preview(self, step: int, steps: int, latents: Tensor) -> Preview:
        """latents `(n, C, h, w)` → one pixel for each latent."""
        columns = latents.float().cpu().movedim(1, -1)
        colours = columns @ self.weights[:-1] + self.weights[-1]
        return Preview(step, steps, colours.round().clamp(0, 255).to(torch.uint8).numpy())


def fit(decode: Callable[[Tensor], Tensor], channels: int) -> LatentColours:
    """`decode`: latents `(n, C, h, w)` → pixels `(n, H, W, 3)` uint8, as an executor does."""
    generator = torch.Generator("cpu").manual_seed(0)
    # Patches of one colour, because a VAE does not decode noise like pictures.
    patches = torch.randn(_SAMPLES, channels, _SIDE // _PATCH, _SIDE // _PATCH, generator=generator)
    latents = interpolate(patches, scale_factor=float(_PATCH))
    pixels = adaptive_avg_pool2d(decode(latents).float().movedim(-1, 1), _SIDE)
    inputs = torch.cat([latents, torch.ones(_SAMPLES, 1, _SIDE, _SIDE)], 1).movedim(1, -1).reshape(-1, channels + 1)
    return LatentColours(torch.linalg.lstsq(inputs, pixels.movedim(1, -1).reshape(-1, 3)).solution)
