"""Every kind's compatibility survives being written as JSON, and says in both sides' numbers why it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from scumble.errors import Incompatible, Refused
from scumble_registry.compatibility import (
    BaseCompatibility,
    LoraCompatibility,
    StoredCompatibility,
    TextualInversionCompatibility,
    VaeCompatibility,
)

BASE = BaseCompatibility(
    family="sd1",
    prediction_type="epsilon",
    in_channels=9,
    latent_channels=4,
    sample_size=64,
    vae_scale=8,
    cross_attention_dim=768,
    text_widths=(768,),
    targets={"unet.conv_in": (4, 9, 3, 3)},
)
LORA = LoraCompatibility(family="sd1", requires={"unet.conv_in": (4, 4, 3, 3)}, ranks={"unet.conv_in": 2})
EMBEDDING = TextualInversionCompatibility(family=None, widths=(768,), vectors=2, token="<a>")
VAE = VaeCompatibility(latent_channels=4, scale=8, parameters=1)


@pytest.mark.parametrize("compatibility", [BASE, LORA, EMBEDDING, VAE], ids=lambda each: each.kind)
def test_its_kind_tells_what_is_read(compatibility: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(StoredCompatibility)
    assert adapter.validate_json(adapter.dump_json(compatibility)) == compatibility


@pytest.mark.parametrize("compatibility", [LORA, EMBEDDING, VAE], ids=lambda each: each.kind)
def test_what_fits_says_nothing(compatibility: Any) -> None:
    compatibility.fits(BASE)


@pytest.mark.parametrize(
    ("compatibility", "says"),
    [
        (EMBEDDING.model_copy(update={"widths": (768, 1280)}), "vectors of width 768x1280, .* have 768"),
        (VAE.model_copy(update={"latent_channels": 16}), "latents with channels 16, but this sd1 base has 4"),
        (VAE.model_copy(update={"scale": 4}), "pixels per latent 4, but this sd1 base has 8"),
        (
            LORA.model_copy(update={"magnitudes": True}),
            "unet.conv_in with 4 channels, but this base.s has 9",
        ),
        (LORA.model_copy(update={"requires": {"unet.a": (2, 2)}}), "unet.a 2x2, which this sd1 base does not have"),
    ],
)
def test_what_does_not_fit_is_said_in_the_numbers_of_both(compatibility: Any, says: str) -> None:
    with pytest.raises(Incompatible, match=says):
        compatibility.fits(BASE)


def test_a_base_is_no_adapter() -> None:
    with pytest.raises(Refused, match="not an adapter; publish it without --base"):
        BASE.fits(BASE)


def test_a_plain_loras_manifest_is_what_it_was_before_there_were_others() -> None:
    assert LORA.model_dump().keys() == {"kind", "family", "requires", "ranks"}
    assert LORA.model_copy(update={"merged": ("unet.a",)}).model_dump().keys() >= {"merged"}
