"""Masks: where in the picture something acts, at the resolution of each level of the UNet.

A white pixel is inside. A mask of another size than the picture is resized to it (Lanczos, its sides' ratio not kept),
made grey and cut at one half, as diffusers' IPAdapterMaskProcessor does; each level then takes it bicubically, so that
edges are soft (and overshoot a little, there as here). diffusers guesses a level's height and width from the number of
its positions, and where a side is odd may guess wrong; here they are known.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def area(mask: NDArray[np.uint8], width: int, height: int, vae_scale: int, levels: int) -> Tensor:
    """Pixels (h, w, 3 or 4; alpha is left out) of a mask for a picture of width x height → (P,) float32: level 0
    first, row by row, ceil(height / vae_scale / 2^level) · ceil(width / vae_scale / 2^level) values each.
    """
    grey = Image.fromarray(mask).convert("RGB").resize((width, height), Image.Resampling.LANCZOS).convert("L")
    inside = torch.from_numpy(np.asarray(grey).astype(np.float32) / 255 >= 0.5).float()
    sizes = [(_side(height, vae_scale, level), _side(width, vae_scale, level)) for level in range(levels)]
    return torch.cat([interpolate(inside[None, None], size=size, mode="bicubic").flatten() for size in sizes])


def _side(pixels: int, vae_scale: int, level: int) -> int:
    return ceil(pixels // vae_scale / (1 << level))
