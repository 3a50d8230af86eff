"""Derive the configs of a checkpoint with the original sizes of Stable Diffusion from the shapes of its weights.

Shapes do not determine attention's heads (8 everywhere in SD 1.x, 64 channels each in the others), activations, the
schedule and the latents' scaling factor. These are constants here, as Stable Diffusion was published. So a checkpoint
of other widths needs a folder with its configs (`Hints.like`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scumble.errors import Refused
from scumble_registry.compatibility import Family, PredictionType, Shape

WIDTHS: Mapping[Family, tuple[int, ...]] = {
    "sd1": (320, 640, 1280, 1280),
    "sd2": (320, 640, 1280, 1280),
    "sdxl": (320, 640, 1280),
}
"""Channels of the UNet's levels."""
VOCABULARY = 49408
_BEGIN, _END = VOCABULARY - 2, VOCABULARY - 1
_SCALING: Mapping[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(?:transformer_blocks\.(\d+)\.)?")

Shapes = Mapping[str, Shape]


def unet_config(shapes: Shapes, family: Family, prediction: PredictionType) -> dict[str, Any]:
    """Return the UNet's config. Raises Refused for a UNet of other widths than the family's."""
    structure = unet_structure(shapes)
    widths = tuple(structure["block_out_channels"])
    if widths != WIDTHS[family] or structure["transformer_layers_per_block"] is None:
        raise Refused(
            f"the checkpoint's UNet (widths {widths}) is not {family}'s original {WIDTHS[family]}, so its config "
            "cannot be derived from its weights: name a folder in the diffusers layout, or a base, that has it: --like"
        )
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in structure["transformer_layers_per_block"]]
    up = [
        "CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(structure["transformer_layers_per_block"])
    ]
    config = {
        "_class_name": "UNet2DConditionModel",
        **structure,
        "transformer_layers_per_block": [depth or 1 for depth in structure["transformer_layers_per_block"]],
        "sample_size": _side(family, prediction),
        "out_channels": 4,
        "attention_head_dim": 8 if family == "sd1" else [width // 64 for width in widths],
        "down_block_types": down,
        "up_block_types": up,
        "upcast_attention": family == "sd2" and prediction == "v_prediction",
    }
    if family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes.get("add_embedding.linear_1.weight", (0, 0))[1],
        }
    return config


def unet_structure(shapes: Shapes) -> dict[str, Any]:
    """Derive the part of a UNet's config that the shapes determine.

    `transformer_layers_per_block` (0: no attention) is None where a level has attentions of several depths. Raises
    Refused for a UNet without cross-attention.
    """
    text = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    conv_in = shapes.get("conv_in.weight", ())
    proj_in = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    if text is None or len(text) != 2 or len(conv_in) != 4 or not proj_in:
        raise Refused("the checkpoint's UNet is incomplete (conv_in or attn2.to_k is missing); get the whole file")
    depths: dict[tuple[str, int], dict[int, int]] = {}
    resnets: dict[tuple[str, int], int] = {}
    for match in filter(None, map(_BLOCK.match, shapes)):
        block, index = (match[1], int(match[2])), int(match[4])
        if match[3] == "resnets":
            resnets[block] = max(resnets.get(block, 0), index + 1)
        else:
            level = depths.setdefault(block, {})
            level[index] = max(level.get(index, 0), int(match[5] or 0) + 1)
    levels = range(sum(side == "down" for side, _ in resnets))
    widths = [shapes.get(f"down_blocks.{level}.resnets.0.conv1.weight", (0,))[0] for level in levels]
    return {
        "in_channels": conv_in[1],
        "block_out_channels": widths,
        "layers_per_block": resnets.get(("down", 0), 0),
        "cross_attention_dim": text[1],
        "use_linear_projection": len(proj_in) == 2,
        "transformer_layers_per_block": _depths(depths, resnets, len(levels)),
    }


def _depths(
    depths: Mapping[tuple[str, int], Mapping[int, int]], resnets: Mapping[tuple[str, int], int], levels: int
) -> list[int] | None:
    by_level = []
    for level in range(levels):
        down, up = ("down", level), ("up", levels - 1 - level)
        counts = [*depths.get(down, {}).values(), *depths.get(up, {}).values()]
        expected = resnets.get(down, 0) + resnets.get(up, 0) if counts else 0
        if len(set(counts)) > 1 or len(counts) != expected or resnets.get(up) != resnets.get(("down", 0), 0) + 1:
            return None
        by_level.append(counts[0] if counts else 0)
    return by_level


def vae_config(shapes: Shapes, family: Family, prediction: PredictionType) -> dict[str, Any]:
    levels = [n for n in shapes if re.fullmatch(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight", n)]
    resnets = [n for n in shapes if re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", n)]
    widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(len(levels))]
    if not widths or "decoder.conv_in.weight" not in shapes:
        raise Refused("the checkpoint's VAE (first_stage_model) is incomplete; get the whole file")
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "layers_per_block": len(resnets),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "in_channels": 3,
        "out_channels": 3,
        "norm_num_groups": 32,
        "sample_size": 1024 if family == "sdxl" else 8 * _side(family, prediction),
        "scaling_factor": _SCALING[family],
    }
    return config | ({"force_upcast": True} if family == "sdxl" else {})


def text_config(shapes: Shapes, *, is_open_clip: bool) -> dict[str, Any]:
    """Return a text encoder's config. Raises Refused for another vocabulary than CLIP's."""
    rows, width = shapes.get("text_model.embeddings.token_embedding.weight", (0, 0))
    if rows != VOCABULARY:
        raise Refused(
            f"the checkpoint's text encoder has {rows} tokens, CLIP's {VOCABULARY}; name a folder in the diffusers "
            "layout, or a base, that has its tokenizer and config: --like"
        )
    for name in ("encoder.layers.0.mlp.fc1.weight", "embeddings.position_embedding.weight"):
        if len(shapes.get(f"text_model.{name}", ())) != 2:
            raise Refused(f"the checkpoint's text encoder lacks {name}; get the whole file", tensor=name)
    layers = {name.split(".")[3] for name in shapes if name.startswith("text_model.encoder.layers.")}
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "layer_norm_eps": 1e-05,
        "projection_dim": projection[0] if projection else width,
        "bos_token_id": _BEGIN,
        "eos_token_id": _END,
        "pad_token_id": 0 if is_open_clip else _END,
    }


def scheduler_config(family: Family) -> dict[str, Any]:
    """Return Stable Diffusion's schedule, without prediction type."""
    more = {"timestep_spacing": "leading", "interpolation_type": "linear"} if family == "sdxl" else {}
    return {
        "_class_name": "EulerDiscreteScheduler" if family == "sdxl" else "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **more,
    }


def model_index(family: Family, texts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return model_index.json; `texts` are the configs of the text encoders."""
    tokenizers = {name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for name in texts}
    more = {"force_zeros_for_empty_prompt": True} if family == "sdxl" else {}
    return {
        "_class_name": _PIPELINES[family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler_config(family)["_class_name"]],
        **{name: ["transformers", config["architectures"][0]] for name, config in texts.items()},
        **tokenizers,
        **more,
    }


def _side(family: Family, prediction: PredictionType) -> int:
    """Return the height of the latents in training: SD 2.x predicts velocity at 768 pixels and noise at 512."""
    if family == "sdxl":
        return 128
    return 96 if family == "sd2" and prediction == "v_prediction" else 64
