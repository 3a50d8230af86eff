"""Derive a ControlNet's compatibility from the shapes of its weights; its config must agree."""

from __future__ import annotations

import math
from typing import Any, Literal

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, ControlNetCompatibility, Family, Shape
from scumble_registry.formats.controlnet import lllite
from scumble_registry.formats.controlnet.config import NetConfig, parse_net, parse_t2i
from scumble_registry.formats.controlnet.conversion import POOLS
from scumble_registry.formats.controlnet.weights import CONTROL_LORA, shapes_of
from scumble_registry.formats.safetensors_header import Header

Form = Literal["net", "union", "t2i", "control_lora", "lllite"]
CLASSES: dict[str, Form] = {"ControlNetModel": "net", "ControlNetUnionModel": "union", "T2IAdapter": "t2i"}
_FAMILIES: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_EMBEDDED = "controlnet_cond_embedding.blocks."


def derive(
    header: Header, name: str, config: dict[str, Any], base: BaseCompatibility | None
) -> ControlNetCompatibility:
    """Derive the compatibility; `name` is the class in config.json, or "" without one. Raises Refused."""
    if lllite.is_lllite(header.tensors):
        return _of_lllite(header, base)
    shapes = shapes_of(header)
    if name == "T2IAdapter":
        return _of_t2i(shapes, config, base)
    form: Form = CLASSES.get(name) or ("control_lora" if CONTROL_LORA in header.tensors else "net")
    parsed = parse_net(config) if name else None
    pools = parsed.global_pool_conditions if parsed is not None else header.metadata.get(POOLS) == "true"
    derived = _of_net(shapes, form, parsed, base, pools=pools)
    if parsed is not None:
        _agree("cross_attention_dim", parsed.cross_attention_dim, derived.cross_attention_dim)
        _agree("in_channels", parsed.in_channels, derived.in_channels)
        _agree("conditioning_channels", parsed.conditioning_channels, derived.conditioning_channels)
        _agree("block_out_channels and layers_per_block", parsed.residual_widths, derived.widths)
    return derived


def _of_net(
    shapes: dict[str, Shape], form: Form, config: NetConfig | None, base: BaseCompatibility | None, *, pools: bool
) -> ControlNetCompatibility:
    text = next((shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if text is None:
        raise Refused("the net has no cross-attention (attn2.to_k), so it cannot be one of Stable Diffusion")
    count = sum(key.startswith("controlnet_down_blocks.") and key.endswith(".weight") for key in shapes)
    residuals = [*(f"controlnet_down_blocks.{i}" for i in range(count)), "controlnet_mid_block"]
    types = _control_types(shapes, config) if form == "union" else 0
    if config is not None:
        is_sdxl = config.addition_embed_type is not None
        _agree("addition_embed_type text_time (SDXL)", is_sdxl, "add_embedding.linear_1.weight" in shapes)
    convolutions = [key for key in shapes if key.startswith(_EMBEDDED) and key.endswith(".weight")]
    return ControlNetCompatibility(
        form=form,
        family=_family(base, text[1]),
        cross_attention_dim=text[1],
        in_channels=_shape(shapes, "conv_in.weight")[1],
        conditioning_channels=_shape(shapes, "controlnet_cond_embedding.conv_in.weight")[1],
        widths=tuple(_shape(shapes, f"{name}.weight")[0] for name in residuals),
        pixels_per_latent=2 ** (len(convolutions) // 2),  # every second one halves the image
        control_types=types,
        pools=pools,
        parameters=_count(shapes),
    )


def _control_types(shapes: dict[str, Shape], config: NetConfig | None) -> int:
    """Return the number of control types of a union net, after checking that its parts have one width."""
    types, width = _shape(shapes, "task_embedding")[:2]
    _agree("num_trans_channel and num_proj_channel", (width, width), _shape(shapes, "spatial_ch_projs.weight"))
    _agree("num_trans_channel", width, _shape(shapes, "conv_in.weight")[0])
    if config is not None:
        _agree("num_control_type", config.num_control_type, types)
        if config.controlnet_conditioning_channel_order != "rgb":
            raise Refused("config.json: a union net reads images as rgb, not bgr")
    return types


def _of_t2i(
    shapes: dict[str, Shape], config: dict[str, Any], base: BaseCompatibility | None
) -> ControlNetCompatibility:
    parsed = parse_t2i(config)
    light = parsed.adapter_type == "light_adapter"
    first = "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"
    out = "adapter.body.{}.out_conv.weight" if light else "adapter.body.{}.resnets.0.block1.weight"
    widths = tuple(_shape(shapes, out.format(level))[0] for level in range(len(parsed.feature_widths)))
    _agree("channels", parsed.feature_widths, widths)
    _agree("in_channels", parsed.in_channels * parsed.downscale_factor**2, _shape(shapes, first)[1])
    return ControlNetCompatibility(
        form="t2i",
        family=_family(base, None),
        conditioning_channels=parsed.in_channels,
        widths=widths,
        # an adapter for SDXL begins at the second level, where height and width of the latents are halved
        pixels_per_latent=parsed.downscale_factor // (2 if parsed.adapter_type == "full_adapter_xl" else 1),
        parameters=_count(shapes),
    )


def _of_lllite(header: Header, base: BaseCompatibility | None) -> ControlNetCompatibility:
    shapes = {name: info.shape for name, info in header.tensors.items()}
    return ControlNetCompatibility(
        form="lllite",
        family=_family(base, None),
        conditioning_channels=3,
        widths=(),
        modules=lllite.modules(shapes),
        parameters=_count(shapes),
    )


def _family(base: BaseCompatibility | None, context: int | None) -> Family | None:
    if base is not None:
        return base.family
    return _FAMILIES.get(context) if context is not None else None


def _shape(shapes: dict[str, Shape], name: str) -> Shape:
    """Return the shape of a tensor with at least two axes. Raises Refused."""
    shape = shapes.get(name, ())
    if len(shape) < 2 or 0 in shape:
        raise Refused(f"tensor {name} is missing or has shape {shape}; the file is incomplete", tensor=name)
    return shape


def _agree(field: str, stated: object, actual: object) -> None:
    if stated != actual:
        raise Refused(
            f"config.json has {field} {stated}, but the weights have {actual}; publish the config of these weights"
        )


def _count(shapes: dict[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
