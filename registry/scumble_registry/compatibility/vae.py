"""Compatibility of a VAE with a base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility


def vae_scale(config: Mapping[str, Any]) -> int:
    """Return the pixels per latent of an AutoencoderKL's config: all levels but the last halve the image."""
    return int(2 ** (max(len(config.get("block_out_channels") or ()), 1) - 1))


class VaeCompatibility(Compatibility):
    kind: Literal["vae"] = "vae"
    family: None = None
    """None: families share the latents' shape, and a file does not show which family's latents it decodes."""
    latent_channels: int
    scale: int
    """Pixels per latent."""
    parameters: int
    """Number of parameters."""
    float32: bool = False
    """Whether it must run in float32, because it overflows half precision."""

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming what the VAE has and what the base has."""
        for what, of_vae, of_base in (
            ("latents with channels", self.latent_channels, base.latent_channels),
            ("pixels per latent", self.scale, base.vae_scale),
        ):
            if of_vae != of_base:
                raise Incompatible(
                    f"the VAE has {what} {of_vae}, but this {base.family} base has {of_base}; "
                    "use a VAE of the base's family",
                    adapter=of_vae,
                    base=of_base,
                )
