"""Previews: small pictures from latents by a linear map, without the VAE.

The map is fitted to the base's VAE when the base is loaded: smooth random latents are decoded once, and least squares
gives the colour of each latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from scumble.events import Preview
from scumble_server.executors.protocol import Vae

_SAMPLES, _LEAST, _PATCH = 16, 8, 4


@dataclass(frozen=True, slots=True)
class LatentColours:
    """A linear map from latents to colours. weights `(C + 1, 3)`: red, green and blue, 0 to 255, of each latent
    channel, then the bias.
    """

    weights: Tensor

    def preview(self, step: int, steps: int, latents: Tensor) -> Preview:
        """Return a preview of latents `(n, C, h, w)`, one pixel per latent."""
        columns = latents.float().cpu().movedim(1, -1)
        colours = columns @ self.weights[:-1] + self.weights[-1]
        return Preview(step, steps, colours.round().clamp(0, 255).to(torch.uint8).numpy())


def fit(vae: Vae, channels: int) -> LatentColours:
    """Fit the map to a VAE, by latents that are as small as it decodes."""
    side = _PATCH * -(-max(vae.least, _LEAST) // _PATCH)
    generator = torch.Generator("cpu").manual_seed(0)
    # Patches of one value, because a VAE decodes noise differently from pictures.
    patches = torch.randn(_SAMPLES, channels, side // _PATCH, side // _PATCH, generator=generator)
    latents = interpolate(patches, scale_factor=float(_PATCH))
    pixels = torch.cat([vae.decode(each[None]) for each in latents]).float().movedim(-1, 1)
    colours = adaptive_avg_pool2d(pixels, side)
    inputs = torch.cat([latents, torch.ones(_SAMPLES, 1, side, side)], 1).movedim(1, -1).reshape(-1, channels + 1)
    return LatentColours(torch.linalg.lstsq(inputs, colours.movedim(1, -1).reshape(-1, 3)).solution)
