"""Compatibility of both kinds of hypernetworks with a base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family
from scumble_registry.compatibility.lora import LoraCompatibility
from scumble_registry.compatibility.shapes import show_widths


class ContextNetworks(BaseModel):
    """A hypernetwork of the webui's kind: networks on the context from which attention computes keys and values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["context"] = "context"
    widths: tuple[int, ...]
    """Widths of the contexts that it changes, ascending: every attention that reads a context of such a width."""
    structure: tuple[float, ...]
    """Width of each layer's input, and of the last layer's output, as multiples of the context's width."""
    activation: str
    activate_output: bool
    layer_norm: bool

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming the widths that no attention in the base has."""
        selves = base.self_attention_widths
        if wrong := sorted(set(self.widths) - selves - {base.cross_attention_dim}):
            raise Incompatible(
                f"the hypernetwork changes contexts of width {show_widths(wrong)}, but attention in this "
                f"{base.family} base reads text of width {base.cross_attention_dim} and hidden states of "
                f"{show_widths(sorted(selves))}; use the base that it was trained on",
                adapter_widths=tuple(wrong),
                base_widths=(base.cross_attention_dim, *sorted(selves)),
            )


class WeightPredictor(BaseModel):
    """A hypernetwork that reads an image or a text and predicts a LoRA."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["predictor"] = "predictor"
    condition: Literal["image", "text"]
    condition_width: int
    """Width of the states that it reads: the image encoder's penultimate, or the text encoder's last."""
    encoder: str | None
    """sha256 of the weights of the encoder that it was trained with, if its file names it."""
    lora: LoraCompatibility
    """Compatibility of the LoRA that it predicts."""

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming the first target that does not match, or the text's widths."""
        self.lora.fits(base)
        if self.condition == "text" and self.condition_width not in base.text_widths[:1]:
            raise Incompatible(
                f"the hypernetwork reads text of width {self.condition_width}, but the text encoder of this "
                f"{base.family} base gives {base.text_widths[0]}; use the base that it was trained on",
                adapter_width=self.condition_width,
                base_width=base.text_widths[0],
            )


class HypernetworkCompatibility(Compatibility):
    kind: Literal["hypernetwork"] = "hypernetwork"
    family: Family | None
    """The base's family, if a base was named; else by the width of the text context, else None."""
    network: Annotated[ContextNetworks | WeightPredictor, Field(discriminator="type")]

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming what does not match."""
        self.network.fits(base)
