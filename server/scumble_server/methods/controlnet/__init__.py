"""ControlNet, union nets, control-LoRA and T2I-Adapter: pictures that steer the UNet.

`checks.py` is what a request may ask for, `scales.py` how strongly each residual acts, `nets.py` what its rows
carry.
"""

from __future__ import annotations

from pathlib import Path

from scumble_registry.formats.controlnet import KIND
from scumble_server.methods.controlnet.checks import FIELDS, check, check_together, describe, idle
from scumble_server.methods.controlnet.nets import Control, features, maps, prepare, row_lites, row_nets


def read_record(path: Path) -> None:
    """There is none: the published files are read, straight into the device."""


__all__ = [
    "FIELDS",
    "KIND",
    "Control",
    "check",
    "check_together",
    "describe",
    "features",
    "idle",
    "maps",
    "prepare",
    "read_record",
    "row_lites",
    "row_nets",
]
