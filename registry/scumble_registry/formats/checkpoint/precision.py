"""Rename weights with a precision in their name (`model.fp16.safetensors`) in folders in the diffusers layout.

Loaders look for the plain name by default, so weights whose plain name is missing get it. A component that has both
keeps both, and the plain one is used.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from scumble.errors import Refused
from scumble_registry.formats.source import Source, Unpacked

_FILE = re.compile(r"(?P<stem>.*(?:/|^)[^/.]+)\.(?P<word>fp16|fp32|bf16|non_ema)(?P<part>-\d+-of-\d+)?\.safetensors")
_INDEX = re.compile(r"(?P<stem>.*(?:/|^)[^/.]+\.safetensors\.index)\.(?P<word>fp16|fp32|bf16|non_ema)\.json")


def one_precision(source: Source) -> Unpacked:
    """Return the source with plain names. Raises Refused for a component in several precisions and no plain name."""
    plain = {name.rpartition("/")[0] for name in source.weights() if not _FILE.fullmatch(name)}
    words: dict[str, set[str]] = {}
    renamed: dict[str, str] = {}
    for name in source.files:
        match = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
        folder = name.rpartition("/")[0]
        if match is None or folder in plain:
            continue
        words.setdefault(folder, set()).add(match["word"])
        renamed[name] = f"{match['stem']}{_part(match)}"
    for folder, of_folder in words.items():
        if len(of_folder) > 1:
            raise Refused(
                f"{folder} holds its weights as {' and '.join(sorted(of_folder))}; keep only the precision to be served"
            )
    if not renamed:
        return Unpacked(source)
    files = {renamed.get(name, name): file for name, file in source.files.items()}
    for name, new in renamed.items():
        if _INDEX.fullmatch(name):
            files[new] = _write_index(source, name, renamed)
    precisions = ", ".join(sorted({word for of_folder in words.values() for word in of_folder}))
    whole = replace(source, files=dict(sorted(files.items())))
    return Unpacked(whole, {"renamed": dict(renamed)}, (), f"diffusers folder ({precisions})")


def _part(match: re.Match[str]) -> str:
    return f"{match['part'] or ''}.safetensors" if match.re is _FILE else ".json"


def _write_index(source: Source, name: str, renamed: dict[str, str]) -> Path:
    """Write the index of a component's shards with their new names."""
    index = source.json(name)
    folder = name.rpartition("/")[0]
    if isinstance(index, dict) and isinstance(shards := index.get("weight_map"), dict):
        new = {key: renamed.get(f"{folder}/{shard}", f"/{shard}").rpartition("/")[2] for key, shard in shards.items()}
        index = index | {"weight_map": new}
    assert source.work is not None
    file = source.work / name.replace("/", "_")
    file.write_text(json.dumps(index), encoding="utf-8")
    return file
