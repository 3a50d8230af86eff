"""Derive the config of a diffusers net without config.json from the shapes of its weights.

Shapes do not determine attention's heads. They are the base's where the net is published for a base of the same
widths, and Stable Diffusion's (8 in SD 1.x, 64 channels each in the others) where its widths are Stable Diffusion's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scumble.errors import Refused
from scumble_registry.compatibility import Shape
from scumble_registry.formats.checkpoint.configs import WIDTHS

EMBEDDING = "controlnet_cond_embedding."
UNION_MARK = "task_embedding"
_BLOCK = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(?:transformer_blocks\.(\d+)\.)?")
_HEADS = 8  # of a union net's attention over control images, in all known nets


def is_diffusers_net(names: Mapping[str, object]) -> bool:
    return any(name.startswith(EMBEDDING) for name in names)


def net_config(
    shapes: Mapping[str, Shape], unet: Mapping[str, Any] | None, *, pools: bool, heads: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return the config; `unet` is the base's, `heads` are fields to be taken instead of its or the family's.

    Raises Refused where the heads are unknown or tensors are missing.
    """
    text = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), ())
    proj_in = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    if len(text) != 2 or not proj_in or len(shapes.get("conv_in.weight", ())) != 4:
        raise Refused("the net has no cross-attention (attn2.to_k), so it cannot be one of Stable Diffusion")
    depths, layers = _levels(shapes)
    widths = [shapes.get(f"down_blocks.{level}.resnets.0.conv1.weight", (0,))[0] for level in range(len(depths))]
    config: dict[str, Any] = {
        "_class_name": "ControlNetUnionModel" if UNION_MARK in shapes else "ControlNetModel",
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": text[1],
        "use_linear_projection": len(proj_in) == 2,
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "conditioning_channels": shapes.get(f"{EMBEDDING}conv_in.weight", (0, 0))[1],
        "conditioning_embedding_out_channels": list(embedding_widths(shapes)),
        "global_pool_conditions": pools,
        **(_heads(widths, text[1], unet) if heads is None else heads),
    }
    if "add_embedding.linear_1.weight" in shapes:
        read = shapes["add_embedding.linear_1.weight"][1]
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": read}
        config["addition_time_embed_dim"] = (unet or {}).get("addition_time_embed_dim") or 256
    return config | (_union(shapes) if UNION_MARK in shapes else {})


def _levels(shapes: Mapping[str, Shape]) -> tuple[list[int], int]:
    """Return the number of transformers on each level (0: no attention), and of resnets per level."""
    depths: dict[int, int] = {}
    layers = 0
    for match in filter(None, map(_BLOCK.match, shapes)):
        level, index = int(match[1]), int(match[3])
        depth = int(match[4]) + 1 if match[4] else 0
        depths[level] = max(depths.get(level, 0), depth)
        layers = max(layers, index + 1) if match[2] == "resnets" else layers
    return [depths.get(level, 0) for level in range(1 + max(depths, default=-1))], layers


def embedding_widths(shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    """Return the widths of the control image's embedding, level by level."""
    widths = [shapes.get(f"{EMBEDDING}conv_in.weight", (0,))[0]]
    while (name := f"{EMBEDDING}blocks.{2 * len(widths) - 1}.weight") in shapes:
        widths.append(shapes[name][0])
    return tuple(widths)


def _heads(widths: list[int], context: int, unet: Mapping[str, Any] | None) -> dict[str, Any]:
    if unet is not None and list(unet.get("block_out_channels", ())) == widths:
        named = ("attention_head_dim", "num_attention_heads", "norm_num_groups")
        return {key: unet[key] for key in named if unet.get(key) is not None}
    if tuple(widths) not in WIDTHS.values():
        raise Refused(
            f"the net (widths {widths}) has no config.json and not the widths of Stable Diffusion; publish the folder "
            "with weights and config, or name its base: --base REF"
        )
    return {"attention_head_dim": 8 if context == 768 else [width // 64 for width in widths]}


def _union(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    types, width = shapes[UNION_MARK][:2]
    layers = {name.split(".")[1] for name in shapes if name.startswith("transformer_layes.")}
    return {
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_head": _HEADS,
        "num_trans_layer": len(layers),
        "num_proj_channel": shapes.get("spatial_ch_projs.weight", (0,))[0],
        "addition_time_embed_dim": shapes.get("control_add_embedding.linear_1.weight", (0, 0))[1] // types,
    }
