"""The picture that a request begins with (img2img), of which a mask may keep a part (inpainting)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest
from scumble.request import Options
from scumble_server.request.pictures import Picture

IMG2IMG_STRENGTH, INPAINTING_STRENGTH = 0.8, 1.0
"""The defaults of diffusers' pipelines."""


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """The picture that a request begins with, and what of it is drawn anew (white in the mask), or None: all of it."""

    picture: Picture
    mask: Picture | None


def strength_of(options: Options) -> float:
    """Return the share of the schedule that is run; 1 without an original."""
    if options.image is None:
        return 1.0
    default = IMG2IMG_STRENGTH if options.mask is None else INPAINTING_STRENGTH
    return default if options.strength is None else options.strength


def check(options: Options, *, inpaints: bool) -> None:
    """`inpaints`: the base looks at a mask. Raises InvalidRequest naming the option."""
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise InvalidRequest(
                    f"options.{name} is for a request that begins with a picture; name one of its images in "
                    "options.image, or leave it out",
                    field=f"options.{name}",
                )
    if inpaints and options.mask is None:
        raise InvalidRequest(
            "this base fills masked parts of a picture; name a picture in options.image and a mask in options.mask",
            field="options.mask" if options.image else "options.image",
        )


def original_of(pixels: NDArray[np.uint8], mask: Picture | None) -> Original:
    """Make the original of a second pass: pixels `(H, W, 3)` of the first."""
    digest = f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"
    height, width = pixels.shape[:2]
    return Original(Picture("", digest, (width, height), lambda: pixels), mask)
