"""Export the webui's `.pt`, the only hypernetwork file that the webui reads: the inverse of `webui.py`.

It is a pickle by torch, which is imported only here in the registry.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

from scumble.errors import Refused, Unavailable
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.formats.stored import StoredVersion

LAYOUTS = ("webui",)
_KEY = re.compile(r"(\d+)\.([kv])\.(.+)")
_JSON_SETTINGS = frozenset(
    {
        "activate_output",
        "dropout_structure",
        "is_layer_norm",
        "last_layer_dropout",
        "layer_structure",
        "step",
        "use_dropout",
    }
)


def export_version(version: StoredVersion, _layout: str, target: Path) -> None:
    stored = version.folder()
    (file,) = (stored / name for name in version.manifest.files if name.endswith(".safetensors"))
    export(file, target)


def export(stored: Path, folder: Path) -> None:
    """Write the .pt of the safetensors file `stored`. Raises Refused for a predictor, Unavailable without torch."""
    settings = read_header(stored).metadata
    if "scumble.predictor" in settings:
        raise Refused(
            "no other tool reads a hypernetwork that predicts a LoRA; get its file with `scumble registry pull`"
        )
    try:
        import torch
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise Unavailable("the webui's .pt is written by torch: pip install 'scumble[build]'") from error
    networks: dict[int, tuple[OrderedDict[str, Any], OrderedDict[str, Any]]] = {}
    for name, tensor in load_file(stored).items():
        if match := _KEY.fullmatch(name):
            pair = networks.setdefault(int(match[1]), (OrderedDict(), OrderedDict()))
            pair["kv".index(match[2])][match[3]] = tensor
    values = {key: _value(key, text) for key, text in settings.items() if key != "format"}
    content: dict[Any, Any] = {**networks, **values}
    torch.save(content, folder / "hypernetwork.pt")


def _value(key: str, text: str) -> Any:
    if key not in _JSON_SETTINGS:
        return text
    try:
        return json.loads(text.replace("True", "true").replace("False", "false"))
    except ValueError:
        return text
