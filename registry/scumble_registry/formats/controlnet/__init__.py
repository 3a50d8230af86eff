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

from pathlib import Path

import numpy as np

from scumble.errors import Refused
from scumble_registry.formats.controlnet import ldm
from scumble_registry.formats.controlnet.derive import CLASSES, derive
from scumble_registry.formats.controlnet.strangers import stranger
from scumble_registry.formats.controlnet.weights import CONTROL_LORA, Weights, read_weights
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.manifest import Manifest

KIND = "controlnet"
FILE_NAME = "diffusion_pytorch_model.safetensors"
"""What the weights are called inside the registry (diffusers' own default)."""

_MAX_BYTES = 8 << 30


def recognises(source: Source) -> bool:
    """By the class in config.json, or by keys that only these nets have."""
    if "model_index.json" in source.files:
        return False
    name = _class_name(source)
    if name in CLASSES or stranger((), name) is not None:
        return True
    headers = [read_header(file) for file in _weights(source)]
    return len(headers) == 1 and (is_original(headers[0]) or stranger(headers[0].tensors, name) is not None)


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
    name = "" if is_original(header) else _class_name(source)
    what = stranger(header.tensors, name)
    if what is not None:
        raise Refused(f"this is {what}; it is not served here")
    _check_values(file, header)
    compatibility = derive(header, name, source.json("config.json") if name else {}, base)
    others = {key: path for key, path in source.files.items() if path != file} if source.path.is_dir() else {}
    return Draft(files={**others, FILE_NAME: file}, compatibility=compatibility)


def _check_values(file: Path, header: Header) -> None:
    for name, info in header.tensors.items():
        if info.end > info.begin and info.dtype not in {"F32", "F16", "BF16"}:
            raise Refused(f"tensor {name} is {info.dtype}; a ControlNet may be F32, F16 or BF16", tensor=name)
    for name, values in read_tensors(file, header).items():
        if not np.isfinite(values).all():
            raise Refused(f"tensor {name} holds NaN or infinite values; the training went wrong", tensor=name)


def is_original(header: Header) -> bool:
    """Is it in the original layout, for `read_weights`? Else it is diffusers' own, with a config.json."""
    return CONTROL_LORA in header.tensors or ldm.is_ldm(header.tensors)


def _class_name(source: Source) -> str:
    if "config.json" not in source.files:
        return ""
    config = source.json("config.json")
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


def _weights(source: Source) -> list[Path]:
    return list(source.weights().values()) or ([source.path] if source.path.is_file() else [])


__all__ = ["FILE_NAME", "KIND", "Weights", "is_original", "read", "read_weights", "recognises"]
