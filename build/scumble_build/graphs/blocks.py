"""The blocks of a UNet under the names that users of block weights know: BASE, IN00…, M00, OUT00…

These count the modules of the original (ldm) UNet: input 0 is the first convolution, every level then has its
resnets (with their attention) and a downsampler; outputs likewise, an upsampler belongs to the entry before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PLACE = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class UNetBlocks:
    """`levels` down (and up) blocks with `layers` resnets each on the way down and one more on the way up."""

    levels: int
    layers: int

    def label(self, target: str) -> str:
        """Return the block of a target, given by its canonical name."""
        if not target.startswith("unet."):
            return "BASE"
        if place := _PLACE.match(target):
            side, level, part, index = place[1], int(place[2]), place[3], int(place[4])
            if side == "down":
                within = self.layers if part == "downsamplers" else index
                return f"IN{1 + level * (self.layers + 1) + within:02}"
            within = self.layers if part == "upsamplers" else index
            return f"OUT{level * (self.layers + 1) + within:02}"
        if target.startswith("unet.mid_block."):
            return "M00"
        return f"OUT{self.count - 1:02}" if target.startswith("unet.conv_out") else "IN00"

    @property
    def count(self) -> int:
        """The number of IN labels, which is also the number of OUT labels."""
        return self.levels * (self.layers + 1)

    @property
    def labels(self) -> tuple[str, ...]:
        sides = [f"{side}{i:02}" for side in ("IN", "OUT") for i in range(self.count)]
        return ("BASE", *sides[: self.count], "M00", *sides[self.count :])


def blocks_of(targets: Iterable[str]) -> UNetBlocks:
    """Read the number of levels and layers from the canonical names of a base's targets."""
    places = [place for target in targets if (place := _PLACE.match(target)) and place[1] == "down"]
    levels = {int(place[2]) for place in places}
    layers = {int(place[4]) for place in places if place[2] == "0" and place[3] == "resnets"}
    return UNetBlocks(len(levels), len(layers))
