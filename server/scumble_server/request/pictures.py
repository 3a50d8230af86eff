"""The pictures that a request brings: decoded and checked at the edge, before any work."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from scumble.errors import InvalidRequest
from scumble_build.pictures import BLACK, WHITE, lay_on, to_eight_bits

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16 << 20
"""The most pixels of one picture: 4096 x 4096."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """pixels `(H, W, 3)` uint8 RGB, or `(H, W, 4)` where the file has transparency, upright.

    `digest` is the sha256 of the encoded file: what caches and receipts know it by.
    """

    name: str
    digest: str
    pixels: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def on_white(self) -> NDArray[np.uint8]:
        """`(H, W, 3)`, laid on white where it is transparent: for originals, references and what is preprocessed."""
        return lay_on(self.pixels, WHITE)

    @property
    def on_black(self) -> NDArray[np.uint8]:
        """`(H, W, 3)`, laid on black where it is transparent: for masks and ready control maps."""
        return lay_on(self.pixels, BLACK)


def decode_all(images: Mapping[str, bytes]) -> dict[str, Picture]:
    """Raises InvalidRequest naming the picture that cannot be used."""
    return {name: decode(name, content) for name, content in images.items()}


def decode(name: str, content: bytes) -> Picture:
    """A still PNG, JPEG or WebP; its size is read and checked before its pixels are.

    Raises InvalidRequest.
    """
    field = f"images.{name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is the lower one
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(field, "it") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(
            f"{field}: these {len(content)} bytes are no picture that can be read; send a PNG, JPEG or WebP file",
            field=field,
        ) from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _too_large(field, f"{width}x{height}")
    try:
        upright = ImageOps.exif_transpose(picture)
        pixels = np.asarray(to_eight_bits(upright))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InvalidRequest(f"{field}: the picture cannot be read ({error}); send another", field=field) from error
    return Picture(name, f"sha256:{hashlib.sha256(content).hexdigest()}", pixels)


def _too_large(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {what} is more than {MAX_PIXELS} pixels; send a smaller picture", field=field)
