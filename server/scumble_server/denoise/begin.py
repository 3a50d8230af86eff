"""What an image begins with: noise alone, or a picture, of which a mask may keep a part.

Whatever is drawn at random is drawn in the order of diffusers' own pipelines, so that the same seed gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scumble_server.denoise.image import Kept, Row
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.schedulers import Table
from scumble_server.executors.protocol import Spread


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """One request's, on the executor's device, shared by its images.

    picture, and what of it is kept (`kept`, for bases that look at it), as latents; mask `(1, H/8, W/8)`, 1 where the
    image is drawn anew.
    """

    picture: Spread
    mask: Tensor | None = None
    kept: Spread | None = None
    pure_noise: bool = False
    """The schedule begins with noise alone, though a mask keeps a part of the picture."""
    shown: bool = False
    """The base looks at mask and kept part itself, in channels of its own."""


def begin(row: Row, beginning: Beginning | None) -> None:
    """Gives a row its first sample, and what it keeps of a picture."""
    noise, table, device = row.noise, row.table, row.sample.device
    if beginning is None:
        row.sample = noise.draw().to(device) * table.init_sigma
        return
    picture = None
    if not (beginning.shown and beginning.pure_noise):
        picture = _sample(beginning.picture, noise)
    fresh = noise.draw().to(device)
    row.sample = _first(picture, fresh, table) if not beginning.pure_noise else fresh * table.init_sigma
    if beginning.mask is not None and beginning.kept is not None:
        kept = _sample(beginning.kept, noise)  # drawn even where it is not looked at
        if beginning.shown:
            row.shown = torch.cat([beginning.mask, kept])
        else:
            assert picture is not None
            row.kept = Kept(picture, fresh, beginning.mask)


def _first(picture: Tensor | None, fresh: Tensor, table: Table) -> Tensor:
    assert picture is not None
    of_picture, of_noise = table.noised[0].tolist()
    first: Tensor = of_picture * picture + of_noise * fresh
    return first


def _sample(spread: Spread, noise: Noise) -> Tensor:
    return spread.mean + spread.deviation * noise.draw().to(spread.mean)
