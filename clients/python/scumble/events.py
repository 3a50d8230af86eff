"""The events of a running request. The server sends them; `images.stream` yields them."""

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
    """The request is accepted; `position` requests are ahead of it (0: next)."""

    position: int


@dataclass(frozen=True, slots=True)
class Step:
    """`step` of `steps` is done for every image of the request (1 ≤ step ≤ steps)."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """Rough images after `step` of `steps`, one pixel for each latent."""

    step: int
    steps: int
    images: Pixels


@dataclass(frozen=True, slots=True)
class Done:
    """The finished images, and the receipt.

    `maps` are the control maps, `(k, H, W, 3)` in the receipt's order, if the request has `return_maps`. If it has a
    `format`, `images` is empty and `encoded` has a file for each image, with its receipt inside.
    """

    images: Pixels
    receipt: Receipt
    maps: Pixels | None = None
    encoded: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without images; other requests are not affected."""

    error: ScumbleError


StreamEvent: TypeAlias = Queued | Step | Preview | Done
"""The events that the client's streams yield; Failed is raised as its error."""
Event: TypeAlias = StreamEvent | Failed
