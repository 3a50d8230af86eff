"""Read the webui's .pt: context width → a pair of networks, for keys and values, with settings beside them.

It is converted to the safetensors layout of `context.py`, with the settings in the header. Old files have the layers
`linear1` and `linear2` instead of numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from scumble_registry.formats.pickled import Placeholder, Plain
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors, write_file
from scumble_registry.formats.source import Source

_KEY = re.compile(r"([1-9]\d{0,4})\.([01])\.(linear\.\d+|linear1|linear2)\.(weight|bias)")
_OLD = {"linear1": "linear.0", "linear2": "linear.1"}
_SIDES = "kv"


def recognises(header: Header) -> bool:
    return any(_KEY.fullmatch(name) for name in header.tensors)


def convert(source: Source, name: str) -> Path:
    """Write the safetensors layout into `source.work`; tensors of no network keep their names."""
    assert source.work is not None
    file = source.work / "hypernetwork.safetensors"
    path = source.files[name]
    tensors = read_tensors(path, read_header(path))
    plain = source.plain.get(name)
    settings = {key: value for key, value in plain.items() if isinstance(key, str)} if isinstance(plain, dict) else {}
    write_file(file, {_rename(key): values for key, values in tensors.items()}, _metadata(settings))
    return file


def _rename(key: str) -> str:
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    return f"{match[1]}.{_SIDES[int(match[2])]}.{_OLD.get(match[3], match[3])}.{match[4]}"


def _metadata(settings: Mapping[str, Plain]) -> dict[str, str]:
    """Return the settings as text, by the .pt's names; None, which means the webui's default, is left out."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in settings.items()
        if value is not None and _is_setting(value)
    }


def _is_setting(value: Plain) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_setting(item) and not isinstance(item, list | tuple) for item in value)
    return not isinstance(value, dict | Placeholder) and isinstance(value, str | int | float | bool)
