"""Pictures of whatever mode → 8-bit RGB, in one way for serving and for training."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels: TypeAlias = NDArray[np.uint8]
Ground: TypeAlias = Literal[0, 255]
"""The grey that is behind what is transparent."""
WHITE: Ground = 255
BLACK: Ground = 0

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of 16-bit grey, whose own conversion cuts everything above 255 to white."""
_PER_LEVEL = 257  # 65535 / 255
_REFUSED = ("F", "La")


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """Convert to RGB, or to RGBA where the picture has transparency.

    16-bit grey, the usual depth map, keeps its range. Raises ValueError for floating point and 32-bit pictures, of
    which nobody can tell what is white.
    """
    if picture.mode in _REFUSED:
        raise ValueError(f"its pixels are of mode {picture.mode}; save it as 8-bit or 16-bit grey, or as RGB")
    if picture.mode in _SIXTEEN_BITS:
        return _from_sixteen_bits(picture)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _from_sixteen_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its grey runs from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    grey = Image.fromarray(((values + _PER_LEVEL // 2) // _PER_LEVEL).astype(np.uint8)).convert("RGB")
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def lay_on(pixels: Pixels, ground: Ground) -> Pixels:
    """Lay pixels `(H, W, 3 or 4)` on a white or black ground: `(H, W, 3)`.

    White is for what is looked at (originals, references, data sets, what is preprocessed); black for ready control
    maps and for masks, in which what is transparent is not covered.
    """
    if pixels.shape[2] == 3:
        return pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    behind = Image.new("RGBA", picture.size, (ground, ground, ground, 255))
    return np.asarray(Image.alpha_composite(behind, picture).convert("RGB"))
