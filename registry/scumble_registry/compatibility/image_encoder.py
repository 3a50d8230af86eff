"""Compatibility of an image encoder with IP-Adapters: the widths of its outputs."""

from __future__ import annotations

from typing import Literal

from scumble.errors import Refused
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility


class ImageEncoderCompatibility(Compatibility):
    kind: Literal["image_encoder"] = "image_encoder"
    family: None = None
    """None: an image encoder works with every family."""
    hidden_size: int
    """Width of its hidden states, which most IP-Adapters read."""
    projection_dim: int
    """Width of its embedding, which `base` IP-Adapters read."""
    image_size: int
    patch_size: int

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Refused: an image encoder serves IP-Adapters and is no adapter of a base."""
        raise Refused(
            f"an image encoder is no adapter of this {base.family} base; publish IP-Adapters with --image-encoder REF"
        )
