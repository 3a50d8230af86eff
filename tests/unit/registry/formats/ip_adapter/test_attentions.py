"""The order of attentions in an IP-Adapter's file is diffusers'."""

from __future__ import annotations

import diffusers
import torch

from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.ip_adapter.attentions import attentions


def test_the_order_is_that_of_sd_15_too() -> None:
    """16 cross-attentions on three levels; more than ten attentions, so that names must not be sorted as words."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    targets = {f"unet.{name}": m.weight.shape for name, m in unet.named_modules() if hasattr(m, "in_features")}
    base = BaseCompatibility(
        family="sd1",
        prediction_type="epsilon",
        in_channels=4,
        latent_channels=4,
        sample_size=64,
        vae_scale=8,
        cross_attention_dim=768,
        text_widths=(768,),
        targets=dict(sorted(targets.items(), reverse=True)),
    )
    expected = [f"unet.{name.removesuffix('.processor')}" for name in unet.attn_processors]
    assert attentions(base) == expected
    assert (len(expected), expected[31]) == (32, "unet.mid_block.attentions.0.transformer_blocks.0.attn2")
