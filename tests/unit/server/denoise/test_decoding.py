"""Pictures are decoded also where device memory is short."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from scumble.errors import OutOfMemory
from scumble_server.denoise.decoding import decode
from scumble_server.executors.protocol import LatentDistribution


@dataclass
class Small:
    """Its device holds `room` pictures, or pieces of them if `pieces`."""

    room: int
    pieces: bool = True
    asked: list[tuple[int, bool]] = field(default_factory=list)

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        self.asked.append((len(latents), tiled))
        if len(latents) > self.room and not (tiled and self.pieces and len(latents) == 1):
            raise OutOfMemory("no room")
        return latents[:, :3].permute(0, 2, 3, 1).to(torch.uint8)

    def encode(self, pixels: Tensor) -> LatentDistribution:
        raise NotImplementedError


LATENTS = torch.arange(2 * 4 * 4.0).view(2, 4, 2, 2)


@pytest.mark.parametrize(
    ("room", "asked"),
    [
        (2, [(2, False)]),
        (1, [(2, False), (1, False), (1, False)]),
        (0, [(2, False), (1, False), (1, True), (1, False), (1, True)]),
    ],
)
def test_what_does_not_fit_is_decoded_in_smaller_parts(room: int, asked: list[tuple[int, bool]]) -> None:
    vae = Small(room)
    assert torch.equal(decode(vae, LATENTS, tiled=False), Small(2).decode(LATENTS))
    assert vae.asked == asked


def test_what_does_not_fit_in_pieces_either_is_a_typed_error() -> None:
    with pytest.raises(OutOfMemory):
        decode(Small(0, pieces=False), LATENTS, tiled=False)
