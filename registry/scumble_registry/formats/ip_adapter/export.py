"""Export a record in h94's layout, which diffusers and the webui's extension both read.

The file's name and header show whether a FaceID-Plus is a PlusV2, as the tensors do not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import BaseCompatibility, IpAdapterCompatibility
from scumble_registry.formats import image_encoder
from scumble_registry.formats.ip_adapter.attentions import attentions
from scumble_registry.formats.ip_adapter.record import IpAdapterRecord, read_record
from scumble_registry.formats.safetensors_header import Array, write
from scumble_registry.formats.stored import StoredVersion

LAYOUTS = ("diffusers", "webui")
_LAYERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}


def export_version(version: StoredVersion, _layout: str, target: Path) -> None:
    """Write a version; both layouts are the same. Raises InvalidRequest without a base."""
    adapter = version.manifest.compatibility
    assert isinstance(adapter, IpAdapterCompatibility)
    if version.base is None:
        raise InvalidRequest("the attentions are numbered by the base: name it with --base", field="base")
    export(read_record(version.record()), adapter, version.base, target)
    encoder = version.folder() / image_encoder.FOLDER
    if encoder.is_dir():
        shutil.copytree(encoder, target / image_encoder.FOLDER, copy_function=shutil.copyfile)


def export(
    record: IpAdapterRecord,
    adapter: IpAdapterCompatibility,
    base: BaseCompatibility,
    folder: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file into the existing `folder`, with attentions numbered by `base`. Raises Refused if it lacks one."""
    index = {name: number for number, name in enumerate(attentions(base))}
    tensors: dict[str, Array] = {f"image_proj.{name}": values for name, values in record.projection.items()}
    for name, values in record.keys.items():
        prefix = _prefix(index, name, base)
        tensors |= {f"{prefix}.to_k_ip.weight": values, f"{prefix}.to_v_ip.weight": record.values[name]}
    for target, module in record.lora.items():
        name, layer = next((target.removesuffix(f".{end}"), end) for end in _LAYERS if target.endswith(f".{end}"))
        stem = f"{_prefix(index, name, base)}.to_{_LAYERS[layer]}_lora"
        tensors |= {f"{stem}.down.weight": module.down, f"{stem}.up.weight": module.up}
    header = dict(metadata or {})
    if adapter.projection == "faceid_plus":
        header["shortcut"] = "true" if adapter.shortcut else "false"
    file = "ip-adapter-plusv2.safetensors" if adapter.shortcut else "ip-adapter.safetensors"
    (folder / file).write_bytes(write(tensors, header))


def _prefix(index: Mapping[str, int], name: str, base: BaseCompatibility) -> str:
    if name not in index:
        raise Refused(f"this {base.family} base has no {name}; name the base that the IP-Adapter is for", target=name)
    return f"ip_adapter.{index[name]}"
