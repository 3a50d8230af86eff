"""ControlNet and its kin: nets that look at a picture and steer the UNet.

| form           | files                                                 | known by                                   |
|----------------|-------------------------------------------------------|--------------------------------------------|
| `net`          | diffusers' ControlNetModel: config.json and weights   | config.json                                |
| `net`          | the original (cldm) file                              | `zero_convs`                               |
| `union`        | diffusers' ControlNetUnionModel                       | config.json                                |
| `t2i`          | diffusers' T2IAdapter                                 | config.json                                |
| `control_lora` | Stability's control-LoRA                              | `lora_controlnet`                          |

There is no record: the server reads the files, through `read_weights` where they are not diffusers' own.
(Zhang et al., 2302.05543; Mou et al., 2302.08453 for T2I-Adapter.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, ControlNetCompatibility, Family, Shape
from scumble_registry.formats.controlnet import ldm
from scumble_registry.formats.controlnet.config import NetConfig, parse_net, parse_t2i
from scumble_registry.formats.controlnet.strangers import stranger
from scumble_registry.formats.controlnet.weights import CONTROL_LORA, Weights, read_weights, shapes_of
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.manifest import Manifest

KIND = "controlnet"
FILE_NAME = "diffusion_pytorch_model.safetensors"
"""What the weights are called inside the registry (diffusers' own default)."""

Form = Literal["net", "union", "t2i", "control_lora"]
_MAX_BYTES = 8 << 30
_CLASSES: dict[str, Form] = {"ControlNetModel": "net", "ControlNetUnionModel": "union", "T2IAdapter": "t2i"}
_FAMILIES: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def recognises(source: Source) -> bool:
    """By the class in config.json, or by keys that only these nets have."""
    if "model_index.json" in source.files:
        return False
    name = _class_name(source)
    if name in _CLASSES or stranger((), name) is not None:
        return True
    headers = [read_header(file) for file in _weights(source)]
    return len(headers) == 1 and (_is_single_file(headers[0]) or stranger(headers[0].tensors, name) is not None)


def read(source: Source, base: Manifest | None) -> Draft:
    if source.path.is_dir():
        check_plain(source)
    if (what := stranger((), _class_name(source))) is not None:
        raise Refused(f"this is {what}; it is not served here")
    files = _weights(source)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise Refused(f"one safetensors file of weights is needed, found {names}; keep the one to be served")
    (file,) = files
    if file.stat().st_size > _MAX_BYTES:
        raise Refused(f"{file.name} is larger than {_MAX_BYTES} bytes, too large for a ControlNet")
    header = read_header(file)
    name = "" if _is_single_file(header) else _class_name(source)
    what = stranger(header.tensors, name)
    if what is not None:
        raise Refused(f"this is {what}; it is not served here")
    _check_values(file, header)
    compatibility = _derive(header, name, source.json("config.json") if name else {}, base)
    others = {key: path for key, path in source.files.items() if path != file} if source.path.is_dir() else {}
    return Draft(files={**others, FILE_NAME: file}, compatibility=compatibility)


def _derive(header: Header, name: str, config: dict[str, Any], base: Manifest | None) -> ControlNetCompatibility:
    shapes = shapes_of(header)
    if name == "T2IAdapter":
        return _of_t2i(shapes, config, base)
    form: Form = _CLASSES.get(name) or ("control_lora" if CONTROL_LORA in header.tensors else "net")
    parsed = parse_net(config) if name else None
    found = _of_net(shapes, form, parsed, base)
    if parsed is not None:
        _agree("cross_attention_dim", parsed.cross_attention_dim, found.cross_attention_dim)
        _agree("in_channels", parsed.in_channels, found.in_channels)
        _agree("conditioning_channels", parsed.conditioning_channels, found.conditioning_channels)
        _agree("block_out_channels and layers_per_block", parsed.residual_widths, found.widths)
    return found


def _of_net(
    shapes: dict[str, Shape], form: Form, config: NetConfig | None, base: Manifest | None
) -> ControlNetCompatibility:
    text = next((shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if text is None:
        raise Refused("the net has no cross-attention (attn2.to_k), so it cannot be one of Stable Diffusion")
    count = sum(key.startswith("controlnet_down_blocks.") and key.endswith(".weight") for key in shapes)
    residuals = [*(f"controlnet_down_blocks.{i}" for i in range(count)), "controlnet_mid_block"]
    types = _shape(shapes, "task_embedding")[0] if form == "union" else 0
    if config is not None and form == "union":
        _agree("num_control_type", config.num_control_type, types)
        if config.controlnet_conditioning_channel_order != "rgb":
            raise Refused("config.json: a union net reads pictures as rgb, not bgr")
    return ControlNetCompatibility(
        form=form,
        family=_family(base, text[1]),
        cross_attention_dim=text[1],
        in_channels=_shape(shapes, "conv_in.weight")[1],
        conditioning_channels=_shape(shapes, "controlnet_cond_embedding.conv_in.weight")[1],
        widths=tuple(_shape(shapes, f"{name}.weight")[0] for name in residuals),
        control_types=types,
        pools=config.global_pool_conditions if config is not None else False,
        parameters=_count(shapes),
    )


def _of_t2i(shapes: dict[str, Shape], config: dict[str, Any], base: Manifest | None) -> ControlNetCompatibility:
    parsed = parse_t2i(config)
    if parsed.adapter_type == "full_adapter_xl":
        raise Refused("this T2I-Adapter (full_adapter_xl) is for SDXL, which this registry does not serve with it yet")
    light = parsed.adapter_type == "light_adapter"
    first = "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"
    out = "adapter.body.{}.out_conv.weight" if light else "adapter.body.{}.resnets.0.block1.weight"
    found = tuple(_shape(shapes, out.format(level))[0] for level in range(len(parsed.feature_widths)))
    _agree("channels", parsed.feature_widths, found)
    _agree("in_channels", parsed.in_channels * parsed.downscale_factor**2, _shape(shapes, first)[1])
    return ControlNetCompatibility(
        form="t2i",
        family=_family(base, None),
        conditioning_channels=parsed.in_channels,
        widths=found,
        pixels_per_latent=parsed.downscale_factor,
        parameters=_count(shapes),
    )


def _family(base: Manifest | None, context: int | None) -> Family | None:
    if base is not None and isinstance(base.compatibility, BaseCompatibility):
        return base.compatibility.family
    return _FAMILIES.get(context) if context is not None else None


def _shape(shapes: dict[str, Shape], name: str) -> Shape:
    """Of a tensor with two axes at least."""
    shape = shapes.get(name, ())
    if len(shape) < 2 or 0 in shape:
        raise Refused(f"tensor {name} is missing or has shape {shape}; the file is not whole", tensor=name)
    return shape


def _agree(field: str, said: object, found: object) -> None:
    if said != found:
        raise Refused(
            f"config.json says {field} {said}, but the weights have {found}; these files do not belong together"
        )


def _count(shapes: dict[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _check_values(file: Path, header: Header) -> None:
    for name, info in header.tensors.items():
        if info.end > info.begin and info.dtype not in {"F32", "F16", "BF16"}:
            raise Refused(f"tensor {name} is {info.dtype}; a ControlNet may be F32, F16 or BF16", tensor=name)
    for name, values in read_tensors(file, header).items():
        if not np.isfinite(values).all():
            raise Refused(f"tensor {name} holds NaN or infinite values; the training went wrong", tensor=name)


def _is_single_file(header: Header) -> bool:
    return CONTROL_LORA in header.tensors or ldm.is_ldm(header.tensors)


def _class_name(source: Source) -> str:
    if "config.json" not in source.files:
        return ""
    config = source.json("config.json")
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


def _weights(source: Source) -> list[Path]:
    return list(source.weights().values()) or ([source.path] if source.path.is_file() else [])


__all__ = ["FILE_NAME", "KIND", "Weights", "read", "read_weights", "recognises"]
