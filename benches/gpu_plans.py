"""The bases that `gpu.py` measures, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from engines import random_models
from memory import FAMILIES, FamilyConfigs
from transformers import CLIPTextConfig, CLIPTextModel

from scumble_build.graphs.models import Models

UNET_PARAMETERS = {"sd1.5": 859_520_964, "sdxl": 2_567_463_684}


@dataclass(frozen=True)
class Plan:
    """A base to measure: `latents` is the side of a square; `context` the width of text states."""

    name: str
    models: Callable[[], Models]
    family: str
    latents: int
    context: int
    steps: int
    images: int
    aim_traffic: float
    unet_bytes: int = 0
    """In half precision."""


def real_plan(name: str, aim: float) -> Plan:
    family: FamilyConfigs = FAMILIES[name]
    ours = {"sd1.5": "sd1", "sdxl": "sdxl"}[name]
    models, width = partial(random_models, family, name), family.unet["cross_attention_dim"]
    return Plan(name, models, ours, family.latents, width, 20, 4, aim, 2 * UNET_PARAMETERS[name])


def tiny_plan() -> Plan:
    def models() -> Models:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
            )
        )
        return Models(unet, {"text_encoder": text}, vae)

    return Plan("tiny", models, "sd1", 8, 32, 2, 2, 1.0)
