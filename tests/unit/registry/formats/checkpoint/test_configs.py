"""Configs of real models are told from their shapes alone; diffusers and transformers build the models."""

from __future__ import annotations

from typing import Any

import pytest

from scumble.errors import Refused
from scumble_registry.formats.checkpoint import configs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in model.state_dict().items()}


@pytest.mark.parametrize("family", UNETS)
def test_the_config_of_a_real_unet_is_told_from_its_shapes(family: Any) -> None:
    with torch.device("meta"):
        real = diffusers.UNet2DConditionModel(sample_size=64, **UNETS[family])
        told = configs.unet_config(shapes(real), family, "epsilon")
        made = diffusers.UNet2DConditionModel.from_config(told)
    assert shapes(made) == shapes(real)
    heads = {name: module.heads for name, module in made.named_modules() if hasattr(module, "heads")}
    assert heads == {name: module.heads for name, module in real.named_modules() if hasattr(module, "heads")}


def test_the_config_of_a_real_vae_is_told_from_its_shapes() -> None:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        real = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **kinds)
        made = diffusers.AutoencoderKL.from_config(configs.vae_config(shapes(real), "sdxl", "epsilon"))
    assert shapes(made) == shapes(real)
    assert (made.config.scaling_factor, made.config.force_upcast) == (0.13025, True)


def test_configs_of_real_text_encoders_are_told_from_their_shapes() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=3, projection_dim=1280)
    with torch.device("meta"):
        real = CLIPTextModelWithProjection(config)
        told = configs.text_config(shapes(real), is_open_clip=True)
        made = CLIPTextModelWithProjection(CLIPTextConfig(**told))
    assert shapes(made) == shapes(real)
    assert (told["num_attention_heads"], told["hidden_act"], told["eos_token_id"]) == (20, "gelu", 49407)


def test_a_unet_of_other_widths_is_refused_with_the_way_to_say_its_config() -> None:
    with torch.device("meta"):
        other = diffusers.UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=768)
    with pytest.raises(Refused, match="--like"):
        configs.unet_config(shapes(other), "sd1", "epsilon")
