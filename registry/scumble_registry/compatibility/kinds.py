"""Every kind's compatibility as one union type, discriminated by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scumble.errors import Refused
from scumble_registry.compatibility.base import BaseCompatibility
from scumble_registry.compatibility.controlnet import ControlNetCompatibility
from scumble_registry.compatibility.dreambooth import DreamboothCompatibility
from scumble_registry.compatibility.hypernetwork import HypernetworkCompatibility
from scumble_registry.compatibility.image_encoder import ImageEncoderCompatibility
from scumble_registry.compatibility.ip_adapter import IpAdapterCompatibility
from scumble_registry.compatibility.lora import LoraCompatibility
from scumble_registry.compatibility.textual_inversion import TextualInversionCompatibility
from scumble_registry.compatibility.vae import VaeCompatibility

Compatibility = Annotated[
    BaseCompatibility
    | LoraCompatibility
    | TextualInversionCompatibility
    | ImageEncoderCompatibility
    | VaeCompatibility
    | IpAdapterCompatibility
    | ControlNetCompatibility
    | DreamboothCompatibility
    | HypernetworkCompatibility,
    Field(discriminator="kind"),
]
"""The union of all kinds; a new kind adds its class here."""


def check_fit(adapter: Compatibility, base: BaseCompatibility) -> None:
    """Check that `adapter` fits `base`. Raises Incompatible, or Refused for a base or an image encoder."""
    if isinstance(adapter, BaseCompatibility):
        raise Refused("this is a base, not an adapter; publish it without --base")
    adapter.fits(base)
