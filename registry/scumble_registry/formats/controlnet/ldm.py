"""Names of the original (ldm) ControlNet's weights → names of diffusers' ControlNetModel.

`input_blocks` count the modules of the encoder: 0 is the first convolution; every level then has its resnets (with
their attention) and, but for the last, a downsampler, whose name ends in `.0.op`. So the file itself says how many
resnets a level has. A residual leaves after each of them through `zero_convs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from scumble.errors import Refused
from scumble_registry.formats.ldm import MIDDLE, RESNET

PREFIX = "control_model."
_DOWNSAMPLER = re.compile(r"input_blocks\.(\d+)\.0\.op\.")
_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block_out.0": "controlnet_mid_block",
    # Convolutions of the picture's embedding stand at even places, activations between them.
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    **{f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)},
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
}

Place = tuple[int, int]
"""Level, and which of its resnets; a downsampler stands where the next resnet would."""


def strip(name: str) -> str:
    return name.removeprefix(PREFIX)


def is_ldm(names: Iterable[str]) -> bool:
    """Only these nets have `zero_convs`."""
    return any(strip(name).startswith("zero_convs.") for name in names)


def converter(names: Iterable[str]) -> Callable[[str], str]:
    """What renames one tensor of this file, e.g. `input_blocks.1.0.in_layers.2.weight` or `….up`.

    The last word of a name stays: `weight`, `bias`, or a factor's. Raises Refused for a name that is no net's.
    """
    places = _places({strip(name) for name in names})

    def convert(name: str) -> str:
        module, _, role = strip(name).rpartition(".")
        if (found := _module(module, places)) is None:
            raise Refused(f"tensor {name} belongs to no ControlNet; is it another kind of file?", tensor=name)
        return f"{found}.{role}"

    return convert


def _places(names: set[str]) -> dict[int, Place]:
    """Of each input block but the first."""
    indices = {int(name.split(".")[1]) for name in names if name.startswith("input_blocks.")}
    downsamplers = {int(match[1]) for name in names if (match := _DOWNSAMPLER.match(name))}
    places: dict[int, Place] = {}
    level = within = 0
    for index in range(1, max(indices, default=0) + 1):
        places[index] = (level, within)
        level, within = (level + 1, 0) if index in downsamplers else (level, within + 1)
    return places


def _module(name: str, places: dict[int, Place]) -> str | None:
    if name in _FIXED:
        return _FIXED[name]
    block, index, inner = (*name.split(".", 2), "", "")[:3]
    if block == "zero_convs" and inner == "0":
        return f"controlnet_down_blocks.{index}"
    if block == "middle_block" and index in MIDDLE:
        part = inner if index == "1" else RESNET.get(inner)
        return f"mid_block.{MIDDLE[index]}.{part}" if part else None
    if block == "input_blocks" and index.isdecimal() and int(index) in places:
        return _input_block(places[int(index)], inner)
    return None


def _input_block(place: Place, inner: str) -> str | None:
    level, within = place
    part, _, rest = inner.partition(".")
    if inner == "0.op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if part == "0" and rest in RESNET:
        return f"down_blocks.{level}.resnets.{within}.{RESNET[rest]}"
    return f"down_blocks.{level}.attentions.{within}.{rest}" if part == "1" and rest else None
