"""Convert T2I-Adapters in the original layout (Mou et al., 2302.08453) to diffusers' names and config.

| kind  | the original                                              | diffusers                             |
|-------|-----------------------------------------------------------|---------------------------------------|
| full  | `conv_in`, `body.{i}.block{1,2}`, `body.{i}.in_conv`      | `adapter.body.{level}.resnets.{j}. …` |
| XL    | the same; the image is unshuffled by 16, not 8            | the same                              |
| light | `body.{level}.body.{j}.block{1,2}`, `.in_conv`, `.out_conv` | likewise                              |

The original full adapter numbers all resnets in one sequence: a new level begins where the width changes, and all
levels have as many resnets as the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scumble.errors import Refused
from scumble_registry.compatibility import Shape

_PREFIX = "adapter."
_FULL = re.compile(r"body\.(\d+)\.(block[12]|in_conv)\.(weight|bias)")
_LIGHT = re.compile(r"body\.(\d+)\.(?:body\.(\d+)\.(block[12])|(in_conv|out_conv))\.(weight|bias)")
_UNSHUFFLED = {192: (3, 8), 64: (1, 8), 768: (3, 16), 256: (1, 16)}
"""Channels after pixel unshuffling → channels of the control image, and the factor of the unshuffling."""


def is_original(names: Mapping[str, object]) -> bool:
    plain = {name.removeprefix(_PREFIX) for name in names}
    return any(name.startswith(("body.0.block1.", "body.0.body.0.block1.")) for name in plain)


def is_diffusers(names: Mapping[str, object]) -> bool:
    """Return whether the names are diffusers' (for weights without a config.json)."""
    return any(name.startswith(f"{_PREFIX}body.0.resnets.0.block1.") for name in names)


def rename(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Map original names to diffusers' names; unknown names are left out."""
    plain = {name: name.removeprefix(_PREFIX) for name in shapes}
    per_level = _resnets_per_level(plain.values())
    renamed: dict[str, str] = {}
    for name, short in plain.items():
        if short.startswith("conv_in."):
            renamed[name] = _PREFIX + short
        elif match := _FULL.fullmatch(short):
            level, index = divmod(int(match[1]), per_level)
            part = match[2] if match[2] == "in_conv" else f"resnets.{index}.{match[2]}"
            renamed[name] = f"{_PREFIX}body.{level}.{part}.{match[3]}"
        elif match := _LIGHT.fullmatch(short):
            part = match[4] or f"resnets.{match[2]}.{match[3]}"
            renamed[name] = f"{_PREFIX}body.{match[1]}.{part}.{match[5]}"
    return renamed


def _resnets_per_level(names: Any) -> int:
    """Return the resnets per level of a full adapter: the second level begins with the first change of width."""
    indices = [int(match[1]) for name in names if (match := _FULL.fullmatch(name)) and match[2] == "in_conv"]
    later = [index for index in indices if index > 0]
    return min(later, default=2)


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Derive the config from diffusers' names and shapes. Raises Refused for an unknown first layer."""
    levels = sorted({int(name.split(".")[2]) for name in shapes if name.startswith(f"{_PREFIX}body.")})
    light = f"{_PREFIX}body.0.out_conv.weight" in shapes
    unshuffled = shapes.get(f"{_PREFIX}body.0.in_conv.weight" if light else f"{_PREFIX}conv_in.weight", (0, 0))[1]
    if unshuffled not in _UNSHUFFLED:
        raise Refused(
            f"the T2I-Adapter's first layer reads {unshuffled} channels; an image unshuffled by 8 or 16 has "
            f"{', '.join(map(str, sorted(_UNSHUFFLED)))}; is the file incomplete?"
        )
    channels, factor = _UNSHUFFLED[unshuffled]
    end = "out_conv" if light else "resnets.0.block1"
    widths = [shapes.get(f"{_PREFIX}body.{level}.{end}.weight", (0,))[0] for level in levels]
    resnets = {name.split(".")[4] for name in shapes if name.startswith(f"{_PREFIX}body.0.resnets.")}
    full = "full_adapter_xl" if factor == 16 else "full_adapter"
    return {
        "_class_name": "T2IAdapter",
        "in_channels": channels,
        "channels": widths[:-1] if light else widths,
        "num_res_blocks": len(resnets),
        "downscale_factor": factor,
        "adapter_type": "light_adapter" if light else full,
    }
