"""Reconstructs the concepts' pictures with the autoencoder and some noise, which gives them the look of generated
images.

The vision tower is trained on these beside the originals, and never on generated images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from scumble.files import whole_file
from scumble_demo.emoji.concepts import concepts
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.pretraining.device import mixed_precision, step_generator
from scumble_demo.pretraining.vae import to_bytes, to_model

NOISE = 0.25  # largest noise, as a share of the latents' deviation


@torch.no_grad()
def soften(
    path: Path, vae: Callable[[], AutoencoderKL], gallery: Gallery, device: torch.device, seed: int
) -> NDArray[np.uint8]:
    """Return pictures like the gallery's `(codes, styles, H, W, 3)`, with the concepts' reconstructed. Cached in
    `path`.
    """
    if path.is_file():
        cached: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        return cached
    model = vae()
    softened = np.array(gallery.pictures)
    for row in range(len(concepts())):
        with mixed_precision(device):
            means = model.encode(to_model(softened[row], device)).latent_dist.mean.float()
            generator = step_generator(seed, row)
            level = torch.rand((len(means), 1, 1, 1), generator=generator) * NOISE * means.std().cpu()
            disturbed = means + (torch.randn(means.shape, generator=generator) * level).to(device)
            softened[row] = to_bytes(model.decode(disturbed).sample)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, softened)
    return softened
