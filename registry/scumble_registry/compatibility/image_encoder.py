"""What an image encoder gives to IP-Adapters."""

from __future__ import annotations

from typing import Literal

from scumble.errors import Refused
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility


class ImageEncoderCompatibility(Compatibility):
    kind: Literal["image_encoder"] = "image_encoder"
    family: None = None
    """Any base's pictures are pictures."""
    hidden_size: int
    """Of its states, which most IP-Adapters read."""
    projection_dim: int
    """Of its embedding, which `base` IP-Adapters read."""
    image_size: int
    patch_size: int

    def fits(self, base: BaseCompatibility) -> None:
        """An image encoder is for IP-Adapters; it is no adapter of a base. Raises Refused."""
        raise Refused(
            f"an image encoder is no adapter of this {base.family} base; publish IP-Adapters with --image-encoder REF"
        )
