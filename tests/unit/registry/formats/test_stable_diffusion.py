"""The real families' modules; the oracles are diffusers' and transformers' own classes, without weights."""

from __future__ import annotations

from typing import Any

import pytest

from scumble_registry.compatibility import Family, canonical_name, matrix_shape
from scumble_registry.formats.stable_diffusion import FAMILIES, stable_diffusion

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
UNETS: dict[Family, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": SDXL,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXTS: dict[Family, tuple[dict[str, int], ...]] = {"sd1": (CLIP_L,), "sd2": (CLIP_H,), "sdxl": (CLIP_L, CLIP_G)}


def modules(component: str, model: Any) -> dict[str, tuple[int, ...]]:
    return {
        canonical_name(f"{component}.{name}"): tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_it_has_the_modules_of_the_real_classes(family: Family) -> None:
    with torch.device("meta"):
        found = modules("unet", diffusers.UNet2DConditionModel(**UNETS[family]))
        for config, component in zip(TEXTS[family], ("text_encoder", "text_encoder_2"), strict=False):
            second = component.endswith("2")
            kind = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
            more = {"projection_dim": 1280} if second else {}
            found |= modules(component, kind(transformers.CLIPTextConfig(**config, **more)))
    ours = stable_diffusion(family)
    assert {name: matrix_shape(shape) for name, shape in ours.targets.items()} == {
        name: matrix_shape(shape) for name, shape in found.items()
    }
    assert ours.text_widths == tuple(config["hidden_size"] for config in TEXTS[family])
