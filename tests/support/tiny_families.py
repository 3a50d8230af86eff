"""Tiny random bases of SD 2.x and SDXL in the diffusers layout, made on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from support.tiny_sd import tiny_tokenizer

SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_tiny_sd2(folder: Path, prediction: Literal["epsilon", "v_prediction"] = "v_prediction", seed: int = 0) -> Path:
    """SD 2.1's classes: a wider text encoder (1024 is what it is known by), linear projections, attention in fp32."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    text_encoder = CLIPTextModel(_text_config(tokenizer, 1024, hidden_act="gelu"))
    unet = _unet(
        cross_attention_dim=1024,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            **SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_tiny_sdxl(folder: Path, seed: int = 0, *, zero_negative: bool = True) -> Path:
    """SDXL's classes: two text encoders of different widths, a pooled text, sizes, several transformers per attention,
    a VAE that asks for fp32.
    """
    torch.manual_seed(seed)
    first, second = tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = "!"
    unet = _unet(
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        block_out_channels=(16, 32, 32),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    StableDiffusionXLPipeline(
        vae=make_vae(force_upcast=True, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config(first, 32)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 48, hidden_act="gelu", projection_dim=40)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
        force_zeros_for_empty_prompt=zero_negative,
        add_watermarker=False,
    ).save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"  # as SDXL's own says it, though Euler does not read it
    config.write_text(json.dumps({**json.loads(config.read_text()), "clip_sample": False, "set_alpha_to_one": False}))
    return folder


def make_tiny_inpainting(base: Path, folder: Path, seed: int = 0) -> Path:
    """An SD 1.x base whose UNet also looks at a mask and at the masked picture."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(seed)
    config = {**UNet2DConditionModel.load_config(base / "unet"), "in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def _text_config(tokenizer: CLIPTokenizer, width: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _unet(**config: Any) -> UNet2DConditionModel:
    config = {"block_out_channels": (16, 32), **config}
    unet = UNet2DConditionModel(sample_size=8, layers_per_block=1, norm_num_groups=8, **config)
    for name, parameter in unet.named_parameters():
        if "attn2.to_v" in name:
            parameter.data *= 3  # so that words are seen
    return unet


def make_vae(seed: int | None = None, **config: Any) -> AutoencoderKL:
    if seed is not None:
        torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
        **config,
    )
