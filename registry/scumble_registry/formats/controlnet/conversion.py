"""Convert files of ControlNets and T2I-Adapters to the layouts that are served.

A `.pth` of the original ControlNet may hold the whole Stable Diffusion that it was trained on: only the net is stored.
A diffusers net without config.json gets one (`inferred_config.py`), a T2I-Adapter in the original layout is converted
to diffusers' (`t2i.py`). Shuffle nets average their residuals over height and width; in the original layout only the
file's name shows it, so it is written into the file's header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scumble_registry.compatibility import Shape
from scumble_registry.formats.controlnet import inferred_config, ldm, lllite, t2i
from scumble_registry.formats.safetensors_header import Header, read_tensors, write_file
from scumble_registry.formats.source import Source
from scumble_registry.formats.unknown_keys import leave_out

POOLS = "global_pool_conditions"
"""The key in the header of a net in the original layout that is `true` for a shuffle net."""
_LIGHTNING = "state_dict."


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted net: `file` has the weights, `config` is the content of config.json, if there is one."""

    file: Path
    dialect: str
    config: Mapping[str, Any] | None = None
    of_base: int = 0
    """Number of tensors of the Stable Diffusion that it was trained on, which are not stored."""
    leftover: tuple[str, ...] = ()


def convert_file(source: Source, file: Path, header: Header) -> Converted:
    """Convert a file without config.json. Raises Refused for unknown keys, or a config that shapes do not determine."""
    if inferred_config.is_diffusers_net(header.tensors):
        return _with_config(source, file, header)
    if t2i.is_original(header.tensors):
        return _t2i(source, file, header)
    if t2i.is_diffusers(header.tensors):
        return Converted(file, "diffusers, without its config", t2i.config(_shapes(header)))
    if lllite.is_lllite(header.tensors):
        leftover = leave_out(source, lllite.unknown_keys(header.tensors), "in a ControlNet-LLLite")
        return Converted(file, "kohya, LLLite", leftover=leftover)
    return _original(source, file, header)


def _original(source: Source, file: Path, header: Header) -> Converted:
    own = {name: name.removeprefix(_LIGHTNING) for name in header.tensors}
    prefixed = any(short.startswith(ldm.PREFIX) for short in own.values())
    net = {name: short for name, short in own.items() if not prefixed or short.startswith((ldm.PREFIX, *ldm.MARKS))}
    convert = ldm.converter(net.values())
    unknown = {n for n, short in net.items() if ldm.strip(short) not in ldm.MARKS and convert(short) is None}
    leftover = leave_out(source, unknown, "in a ControlNet in the original layout")
    net = {name: short for name, short in net.items() if name not in unknown}
    pools = header.metadata.get(POOLS) == "true" or "shuffle" in file.stem.lower()
    marks = {short.removeprefix(ldm.PREFIX) for short in net.values()} & set(ldm.MARKS)
    dialect = {"lora_controlnet": "control-LoRA", "difference": "original, differences"}.get(
        next(iter(marks), ""), "original"
    )
    is_alone = net.keys() == header.tensors.keys() and not any(name.startswith(_LIGHTNING) for name in net)
    if is_alone and (not pools or POOLS in header.metadata):
        return Converted(file, dialect)
    tensors = read_tensors(file, header)
    metadata = header.metadata | ({POOLS: "true"} if pools else {})
    written = _write(source, {short: tensors[name] for name, short in net.items()}, metadata)
    return Converted(written, dialect, of_base=len(own) - len(net) - len(unknown), leftover=leftover)


def _with_config(source: Source, file: Path, header: Header) -> Converted:
    unet = None
    if source.base_folder is not None:
        unet = json.loads((source.base_folder() / "unet/config.json").read_text(encoding="utf-8"))
    config = inferred_config.net_config(_shapes(header), unet, pools="shuffle" in file.stem.lower())
    return Converted(file, "diffusers, without its config", config)


def _t2i(source: Source, file: Path, header: Header) -> Converted:
    names = t2i.rename(_shapes(header))
    leftover = leave_out(source, header.tensors.keys() - names.keys(), "in a T2I-Adapter")
    tensors = read_tensors(file, header)
    written = _write(source, {new: tensors[old] for old, new in names.items()}, {})
    config = t2i.config({new: header.tensors[old].shape for old, new in names.items()})
    return Converted(written, "original", config, leftover=leftover)


def _write(source: Source, tensors: dict[str, Any], metadata: dict[str, str]) -> Path:
    assert source.work is not None
    file = source.work / "net.safetensors"
    write_file(file, tensors, metadata)
    return file


def write_config(source: Source, config: Mapping[str, Any]) -> Path:
    assert source.work is not None
    file = source.work / "config.json"
    file.write_text(json.dumps(dict(config), indent=2), encoding="utf-8")
    return file


def _shapes(header: Header) -> dict[str, Shape]:
    return {name: info.shape for name, info in header.tensors.items()}
