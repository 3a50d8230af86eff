"""The config of a net is told from its shapes; diffusers builds the net."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")


REAL: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("union", [False, True], ids=["net", "union"])
@pytest.mark.parametrize("family", REAL)
def test_the_config_of_a_real_net_is_told_from_its_shapes(family: str, union: bool) -> None:
    from diffusers import ControlNetModel, ControlNetUnionModel

    from scumble_registry.formats.controlnet.inferred_config import net_config

    kind = ControlNetUnionModel if union else ControlNetModel
    of_union = {
        "num_control_type": 8,
        "num_trans_channel": 320,
        "num_proj_channel": 320,
        "addition_time_embed_dim": 256,
    }
    more = of_union if union else {}
    with torch.device("meta"):
        real = kind(**{**REAL[family], **more})
        shapes = {name: tuple(values.shape) for name, values in real.state_dict().items()}
        told = net_config(shapes, None, pools=False)
        made = kind.from_config(told)
    assert told["_class_name"] == kind.__name__
    assert {name: tuple(values.shape) for name, values in made.state_dict().items()} == shapes
    heads = [module.heads for module in real.modules() if hasattr(module, "heads")]
    assert heads == [module.heads for module in made.modules() if hasattr(module, "heads")]
