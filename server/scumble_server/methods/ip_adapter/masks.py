"""Masks: where in the picture something acts, at the resolution of each level of the UNet.

A white pixel is inside. A mask of another size than the picture is resized to it (Lanczos, its sides' ratio not kept),
made grey and cut at one half, as diffusers' IPAdapterMaskProcessor does; each level then takes it bicubically, so that
edges are soft (and overshoot a little, there as here). diffusers guesses a level's height and width from the number of
its positions, and where a side is odd may guess wrong; here they are known.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from scumble_build.graphs.inputs import level_sizes


def area(mask: NDArray[np.uint8], width: int, height: int, vae_scale: int, levels: int) -> Tensor:
    """Pixels (h, w, 3 or 4; alpha is left out) of a mask for a picture of width x height → (P,) float32, flat over
    `level_sizes` of its latents, row by row.
    """
    grey = Image.fromarray(mask).convert("RGB").resize((width, height), Image.Resampling.LANCZOS).convert("L")
    inside = torch.from_numpy(np.asarray(grey).astype(np.float32) / 255 >= 0.5).float()
    sizes = level_sizes(height // vae_scale, width // vae_scale, levels)
    return torch.cat([interpolate(inside[None, None], size=size, mode="bicubic").flatten() for size in sizes])
