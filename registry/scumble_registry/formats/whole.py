"""The components of a folder, each compared with its own config (`structure.py`) before it is stored.

Tensors that a config does not describe are refused, or, if the publisher allows it, taken out of the stored files, so
that whatever is stored loads strictly.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scumble.errors import Refused
from scumble_registry.formats import structure
from scumble_registry.formats.safetensors_header import read_header, read_tensors, write_file
from scumble_registry.formats.source import Source
from scumble_registry.formats.structure import ModelClass


@dataclass(frozen=True, slots=True)
class Whole:
    """A source whose components are whole, and the tensors that were taken out, as `unet/name`, sorted."""

    source: Source
    leftover: tuple[str, ...] = ()


def only_whole(source: Source, components: Mapping[str, ModelClass], what: str = "") -> Whole:
    """Compare the components, folder → class, with their configs; the folder "" is the source itself, called `what`.

    Raises Refused, naming missing, unknown and misshapen tensors, and for weights by a name that no loader looks for;
    Unavailable without diffusers.
    """
    files = dict(source.files)
    leftover: list[str] = []
    for folder, kind in components.items():
        prefix = f"{folder}/" if folder else ""
        config = source.json(f"{prefix}config.json")
        for names in _weights(source, prefix, kind, folder or what):
            tensors = {n: info.shape for name in names for n, info in read_header(source.files[name]).tensors.items()}
            mismatch = structure.compare(kind, config if isinstance(config, dict) else {}, tensors)
            if mismatch.unknown and source.allow_leftover:
                files |= _take_out(source, names, mismatch.unknown)
                leftover += [prefix + name for name in mismatch.unknown]
                mismatch = replace(mismatch, unknown=())
            mismatch.refuse(folder or what)
    return Whole(replace(source, files=files), tuple(sorted(leftover)))


def check_headers(folder: Path) -> None:
    """Read the headers of a component's weights, with limits that the libraries do not have.

    Raises Refused, naming the file and what it is instead, or the folder that has no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refused(f"{folder.name} has no weights in safetensors; get the whole folder again, or save it as such")
    for file in files:
        read_header(file, f"{folder.name}/{file.name}")


def write_without(file: Path, names: Collection[str], target: Path) -> Path:
    """Write a file of weights again, as `target`, without these tensors. Returns `target`."""
    header = read_header(file)
    kept = {name: values for name, values in read_tensors(file, header).items() if name not in names}
    write_file(target, kept, header.metadata)
    return target


def _weights(source: Source, prefix: str, kind: ModelClass, what: str) -> list[list[str]]:
    """Return the files that loaders look for: one, or all shards of an index; both if a folder has both."""
    stem = "model" if kind.startswith("CLIP") else "diffusion_pytorch_model"
    one, index = f"{prefix}{stem}.safetensors", f"{prefix}{stem}.safetensors.index.json"
    sets = [[one]] if one in source.files else []
    if index in source.files:
        shards = _weight_map(source, index).values()
        sets.append(sorted({f"{prefix}{shard}" for shard in shards} & source.files.keys()))
    if not sets:
        raise Refused(
            f"{what} has no {stem}.safetensors, which is the name that its weights are loaded by; rename the file"
        )
    return sets


def _take_out(source: Source, names: list[str], leftover: Collection[str]) -> dict[str, Path]:
    """Return name → file without `leftover`, for the files that have some of it, and for their index."""
    assert source.work is not None
    changed = {
        name: write_without(source.files[name], leftover, source.work / f"whole_{name.replace('/', '_')}")
        for name in names
        if read_header(source.files[name]).tensors.keys() & set(leftover)
    }
    prefix = names[0].rpartition("/")[0]
    for name in source.files:
        if name.endswith(".safetensors.index.json") and name.rpartition("/")[0] == prefix and len(names) > 1:
            kept = {key: shard for key, shard in _weight_map(source, name).items() if key not in leftover}
            file = source.work / f"whole_{name.replace('/', '_')}"
            file.write_text(json.dumps(source.json(name) | {"weight_map": kept}), encoding="utf-8")
            changed[name] = file
    return changed


def _weight_map(source: Source, index: str) -> dict[str, Any]:
    content = source.json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise Refused(f"{index} has no weight_map; save the model again with diffusers")
    return shards
