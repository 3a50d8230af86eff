"""What a running request says while it runs. The server sends them; `images.stream` yields them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from scumble.errors import ScumbleError
from scumble.receipt import Receipt

Pixels: TypeAlias = NDArray[np.uint8]
"""`(n, H, W, 3)`, RGB, 0–255."""


@dataclass(frozen=True, slots=True)
class Queued:
    """Accepted; `position` requests are ahead of it (0: next)."""

    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """`step` of `steps` is done for every image of the request (1 ≤ step ≤ steps)."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What the pictures will about be, one pixel for each latent, after `step` of `steps`."""

    step: int
    steps: int
    images: Pixels


@dataclass(frozen=True, slots=True)
class Done:
    """The pictures, and the receipt: what was asked, bound, drawn and timed.

    `maps` are the control maps, `(k, H, W, 3)` in the receipt's order, if the request asked for them.
    Where it asked for a format, `images` is empty and `encoded` holds a file for each, with its receipt inside.
    """

    images: Pixels
    receipt: Receipt
    maps: Pixels | None = None
    encoded: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a picture; nobody else's was touched."""

    error: ScumbleError


StreamEvent: TypeAlias = Queued | Step | Preview | Done
"""What the client's streams yield; Failed is raised instead."""
Event: TypeAlias = StreamEvent | Failed
