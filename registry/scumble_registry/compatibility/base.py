"""What an adapter must match in a base: names and shapes of the targets, and widths."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from scumble.errors import Refused
from scumble_registry.compatibility.shapes import Shape

Family = Literal["sd1", "sd2", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""The UNet's output: the noise, the velocity (Salimans and Ho, 2202.00512), or the denoised sample."""


class Compatibility(BaseModel):
    """What a version needs of a base; derived from its files. Each kind has a class of its own (`kinds.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    family: Family | None
    """None where the files do not tell, and no base was named."""

    def fits(self, base: BaseCompatibility) -> None:
        """Raise Incompatible, naming the first thing that does not match, or Refused for what is no adapter."""
        raise NotImplementedError


class BaseCompatibility(Compatibility):
    kind: Literal["base"] = "base"
    family: Family
    prediction_type: PredictionType
    in_channels: int
    """Input channels of the UNet: 4 as a rule, 9 for inpainting bases."""
    latent_channels: int
    sample_size: int
    """Height and width of the latents that the base was trained on."""
    vae_scale: int
    """Pixels per latent: 8 as a rule."""
    cross_attention_dim: int
    text_widths: tuple[int, ...]
    """Hidden size of each text encoder."""
    targets: dict[str, Shape]

    def fits(self, base: BaseCompatibility) -> None:  # noqa: ARG002 - it fits none
        """Raise Refused: a base is no adapter."""
        raise Refused("this is a base, not an adapter; publish it without --base")

    @property
    def self_attention_widths(self) -> frozenset[int]:
        """Widths of the hidden states that the UNet's self-attentions read."""
        ends = (".attn1.to_q", ".attn1.to_k")
        return frozenset(
            shape[1] for name, shape in self.targets.items() if name.startswith("unet.") and name.endswith(ends)
        )
