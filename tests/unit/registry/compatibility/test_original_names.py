"""Original names of a UNet's modules; the oracle is diffusers' converter of single files."""

from __future__ import annotations

from typing import Any

import pytest

from scumble_registry.compatibility.original_names import original_names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = {"cross_attention_dim": 12}
SDXL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
def test_names_are_those_that_diffusers_converts_from(config: dict[str, Any]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, **config}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    parameters = dict(unet.named_parameters())
    modules = {name.rpartition(".")[0] for name in parameters}
    names = original_names(modules)
    assert names.keys() == modules
    assert len(set(names.values())) == len(names)
    original = {}
    for name, values in parameters.items():
        module, _, role = name.rpartition(".")
        original[f"model.diffusion_model.{names[module]}.{role}"] = values
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert {name: id(values) for name, values in converted.items()} == {
        name: id(values) for name, values in parameters.items()
    }


def test_what_is_no_module_of_a_unet_has_no_name() -> None:
    assert original_names(["encoder.layers.0", "down_blocks.0.motion_modules.0.proj_in"]) == {}
