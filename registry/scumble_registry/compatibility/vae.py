"""What a VAE needs of a base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility


def vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels per latent of the AutoencoderKL with this config: all its levels but the last halve the picture."""
    return int(2 ** (max(len(config.get("block_out_channels") or ()), 1) - 1))


class VaeCompatibility(Compatibility):
    kind: Literal["vae"] = "vae"
    family: None = None
    """Families share latents of one shape; that the colours are right, nobody can tell from a file."""
    latent_channels: int
    scale: int
    """Pixels per latent."""
    parameters: int
    """Numbers that it holds."""
    float32: bool = False
    """It overflows half precision."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming what the VAE has and what the base has."""
        for what, mine, its in (
            ("latents with channels", self.latent_channels, base.latent_channels),
            ("pixels per latent", self.scale, base.vae_scale),
        ):
            if mine != its:
                raise Incompatible(
                    f"the VAE has {what} {mine}, but this {base.family} base has {its}; use one of the base's family",
                    adapter=mine,
                    base=its,
                )
