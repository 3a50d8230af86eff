"""The pictures that a request brings: bounded by their headers, then read once at the edge to see that they can be.

Their pixels are not kept: an open request holds its encoded files, and whoever looks at a picture reads it again and
shrinks it to what it needs. So large pictures take no memory while a request waits.
"""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from scumble.errors import InvalidRequest
from scumble_build.pictures import BLACK, WHITE, lay_on, to_eight_bits

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16 << 20
"""The most pixels of one picture: 4096 x 4096."""
MAX_PIXELS_OF_REQUEST = 4 * MAX_PIXELS
"""The most pixels of all pictures of one request."""
MAX_PIXELS_AT_ONCE = 2 * MAX_PIXELS
"""The most pixels that are read at once, of all open requests. Pillow needs up to 12 bytes for each."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture of a request. size: width and height, upright; `digest` is the sha256 of the encoded file: what caches
    and receipts know it by.
    """

    name: str
    digest: str
    size: tuple[int, int]
    read: Callable[[], NDArray[np.uint8]]
    """Makes its pixels, anew each time: see `pixels`."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """`(H, W, 3)` uint8 RGB, or `(H, W, 4)` where the file has transparency, upright. Keep them no longer than
        needed.
        """
        return self.read()

    @property
    def on_white(self) -> NDArray[np.uint8]:
        """`(H, W, 3)`, laid on white where it is transparent: for originals, references and what is preprocessed."""
        return lay_on(self.pixels, WHITE)

    @property
    def on_black(self) -> NDArray[np.uint8]:
        """`(H, W, 3)`, laid on black where it is transparent: for masks and ready control maps."""
        return lay_on(self.pixels, BLACK)


class PixelBudget:
    """Bounds how many pixels are read at once. Any thread may call it."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for a picture of this size. One that is larger than all goes alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + pixels <= self._most)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_reading = PixelBudget(MAX_PIXELS_AT_ONCE)


def decode_all(images: Mapping[str, bytes]) -> dict[str, Picture]:
    """Raises InvalidRequest naming the picture that cannot be used, or that is too much, before any is decoded."""
    total = 0
    for name, content in images.items():
        width, height = _open(name, content).size
        total += width * height
        if total > MAX_PIXELS_OF_REQUEST:
            raise InvalidRequest(
                f"images.{name}: with it, the request's pictures have more than {MAX_PIXELS_OF_REQUEST} pixels in all; "
                "send fewer, or smaller ones",
                field=f"images.{name}",
            )
    return {name: decode(name, content) for name, content in images.items()}


def decode(name: str, content: bytes) -> Picture:
    """A still PNG, JPEG or WebP; its size is read and checked before its pixels are. Raises InvalidRequest."""

    def read() -> NDArray[np.uint8]:
        return _pixels(name, content)

    height, width = read().shape[:2]
    return Picture(name, f"sha256:{hashlib.sha256(content).hexdigest()}", (width, height), read)


def _open(name: str, content: bytes) -> Image.Image:
    """Read the header."""
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
    return picture


def _pixels(name: str, content: bytes) -> NDArray[np.uint8]:
    field, picture = f"images.{name}", _open(name, content)
    with _reading.take(picture.width * picture.height):
        try:
            pixels: NDArray[np.uint8] = np.asarray(to_eight_bits(ImageOps.exif_transpose(picture)))
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise InvalidRequest(f"{field}: the picture cannot be read ({error}); send another", field=field) from error
    return pixels


def _too_large(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {what} is more than {MAX_PIXELS} pixels; send a smaller picture", field=field)
