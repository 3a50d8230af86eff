"""Export a stored net in a layout that other tools read.

diffusers    `config.json` and weights by diffusers' names
webui        one file of weights; its extension reads the original layout, diffusers' names and control-LoRAs
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from scumble.errors import Refused
from scumble_registry.formats.controlnet import inferred_config
from scumble_registry.formats.controlnet.conversion import POOLS
from scumble_registry.formats.controlnet.weights import read_weights
from scumble_registry.formats.safetensors_header import read_header, write_file
from scumble_registry.formats.stored import StoredVersion

LAYOUTS = ("diffusers", "webui")
_WEIGHTS, _CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


def export_version(version: StoredVersion, layout: str, target: Path) -> None:
    base = version.base_folder()
    unet = json.loads((base / "unet/config.json").read_bytes()) if base is not None else None
    export(version.folder(), unet, layout, target)


def export(stored: Path, unet: dict[str, Any] | None, layout: str, folder: Path) -> None:
    """Write the layout into `folder`. `stored` is the registry's folder, `unet` the base's UNet config, if known.

    Raises Refused for a net that diffusers has no layout for.
    """
    weights = stored / _WEIGHTS
    if layout == "webui" or (stored / _CONFIG).is_file():
        shutil.copyfile(weights, folder / _WEIGHTS)
        if layout == "diffusers":
            shutil.copyfile(stored / _CONFIG, folder / _CONFIG)
        return
    net = read_weights(weights)
    if net.needs_base:
        raise Refused(
            "this net is stored as differences to its base, for which diffusers has no layout; export it as webui",
            layout=layout,
        )
    header = read_header(weights)
    shapes = {name: values.shape for name, values in net.full.items()}
    config = inferred_config.net_config(shapes, unet, pools=header.metadata.get(POOLS) == "true")
    (folder / _CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    write_file(folder / _WEIGHTS, net.full, {"format": "pt"})
