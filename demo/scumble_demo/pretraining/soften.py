"""What the autoencoder makes of the concepts' pictures, slightly disturbed: the look of generated pictures.

The vision tower learns from these beside the originals. They are real renderings seen through the VAE;
no generated picture is ever learnt.
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

NOISE = 0.25  # at most this share of the latents' deviation


@torch.no_grad()
def soften(
    path: Path, vae: Callable[[], AutoencoderKL], gallery: Gallery, device: torch.device, seed: int
) -> NDArray[np.uint8]:
    """Pictures like the gallery's `(codes, styles, H, W, 3)`; only the concepts' differ. Kept in `path`."""
    if path.is_file():
        kept: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        return kept
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
