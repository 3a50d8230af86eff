"""ControlNet and related nets, which read a control image and add to the UNet's states.

| form           | files                                                        | recognised by                 |
|----------------|--------------------------------------------------------------|-------------------------------|
| `net`          | diffusers' ControlNetModel: config.json and weights          | config.json                   |
| `net`          | its weights alone                                            | `controlnet_cond_embedding`   |
| `net`          | the original (cldm) file, also as differences to the base    | `zero_convs`                  |
| `union`        | diffusers' ControlNetUnionModel, with or without config.json | config.json, `task_embedding` |
| `t2i`          | diffusers' T2IAdapter, with or without config.json           | config.json, `adapter.body`   |
| `t2i`          | the original file: full, light, XL                           | `body.0.block1`, …            |
| `control_lora` | Stability's control-LoRA                                     | `lora_controlnet`             |
| `lllite`       | kohya's ControlNet-LLLite (`lllite.py`)                      | `lllite_unet_`                |

There is no record: the server reads the stored files, those that are not in diffusers' layout by `read_weights`.
(Zhang et al., 2302.05543; Mou et al., 2302.08453 for T2I-Adapter.)
"""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, ControlNetCompatibility
from scumble_registry.formats.controlnet import inferred_config, ldm, lllite, t2i
from scumble_registry.formats.controlnet.conversion import Converted, convert_file, write_config
from scumble_registry.formats.controlnet.derive import CLASSES, derive
from scumble_registry.formats.controlnet.export import LAYOUTS, export_version
from scumble_registry.formats.controlnet.refused_models import refused_model
from scumble_registry.formats.controlnet.weights import CONTROL_LORA, NetWeights, read_weights
from scumble_registry.formats.controlnet.whole_net import only_whole_net
from scumble_registry.formats.floats import check_finite
from scumble_registry.formats.format import Format
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain

KIND = "controlnet"
FILE_NAME = "diffusion_pytorch_model.safetensors"
"""The weights' name inside the registry, which is diffusers' default."""

_MAX_BYTES = 8 << 30


def recognises(source: Source) -> bool:
    """Recognise a net by the class in config.json, or by keys that only these nets have."""
    if "model_index.json" in source.files:
        return False
    name = _class_name(source)
    if name in CLASSES or refused_model((), name) is not None:
        return True
    files = list(source.weights().values())
    return len(files) == 1 and _looks_like_net(read_header(files[0]))


def _looks_like_net(header: Header) -> bool:
    names = header.tensors
    known = (
        is_original(header)
        or inferred_config.is_diffusers_net(names)
        or t2i.is_original(names)
        or t2i.is_diffusers(names)
    )
    known = known or lllite.is_lllite(names)
    return known or refused_model(names, "") is not None


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    if source.path.is_dir():
        check_plain(source)
    if (what := refused_model((), _class_name(source))) is not None:
        raise Refused(f"this is {what}; it cannot be served")
    files = list(source.weights().values())
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise Refused(f"one file of weights is needed, not {names}; keep only the one to be served")
    (file,) = files
    if file.stat().st_size > source.limit(_MAX_BYTES):
        raise Refused(f"{file.name} is larger than {source.limit(_MAX_BYTES)} bytes, too large for a ControlNet")
    header = read_header(file)
    name = "" if is_original(header) or t2i.is_original(header.tensors) else _class_name(source)
    if (what := refused_model(header.tensors, name)) is not None:
        raise Refused(f"this is {what}; it cannot be served")
    converted = Converted(file, "diffusers", source.json("config.json")) if name else convert_file(source, file, header)
    header = read_header(converted.file)
    _check_values(converted.file, header)
    config = converted.config or {}
    derive(header, str(config.get("_class_name", "")), dict(config), base)
    if not lllite.is_lllite(header.tensors):
        converted = only_whole_net(source, converted)
    compatibility = derive(read_header(converted.file), str(config.get("_class_name", "")), dict(config), base)
    others = {key: path for key, path in source.files.items() if path != file} if source.path.is_dir() else {}
    if converted.config is not None and not name:
        others["config.json"] = write_config(source, converted.config)
    return Draft(
        files={**others, FILE_NAME: converted.file},
        compatibility=compatibility,
        dialect=converted.dialect,
        details=_details(compatibility, converted, has_base=base is not None),
        leftover=converted.leftover,
    )


def _details(compatibility: ControlNetCompatibility, converted: Converted, *, has_base: bool) -> dict[str, JsonValue]:
    served = {
        "t2i": "features of a control image, once per request",
        "lllite": "networks on the inputs of attention's projections, every step",
    }
    return {
        "serving": served.get(compatibility.form, "residuals of a net, every step"),
        "left_out_of_the_base_in_the_file": converted.of_base,
        "family_told_by": "the base" if has_base else "the width of the text that it reads",
    }


def _check_values(file: Path, header: Header) -> None:
    for name, info in header.tensors.items():
        if info.end > info.begin and info.dtype not in {"F32", "F16", "BF16"}:
            raise Refused(f"tensor {name} is {info.dtype}; a ControlNet may be F32, F16 or BF16", tensor=name)
    check_finite(read_tensors(file, header))


def is_original(header: Header) -> bool:
    """Return whether it is in the original layout, for `read_weights`; else it is diffusers', with a config.json."""
    return CONTROL_LORA in header.tensors or ldm.is_ldm(header.tensors)


def _class_name(source: Source) -> str:
    if "config.json" not in source.files:
        return ""
    config = source.json("config.json")
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


FORMAT = Format(
    KIND,
    "a ControlNet's or T2I-Adapter's weights, with config.json or without",
    recognises,
    read,
    LAYOUTS,
    export_version,
)

__all__ = ["FILE_NAME", "FORMAT", "KIND", "NetWeights", "is_original", "read", "read_weights", "recognises"]
