"""Names of the UNet's modules in the original code (ldm, sgm), which kohya's SDXL files and single files use.

`input_blocks` count everything with a skip connection: the first convolution, then each level's resnets (with their
attention) and its downsampler. `output_blocks` count resnets; a level's upsampler is in its last block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Original name of each part of a resnet → diffusers' name."""
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_DOWNSAMPLER = re.compile(r"input_blocks\.(\d+)\.0\.op\.")
_UPSAMPLER = re.compile(r"output_blocks\.(\d+)\.[12]\.conv\.")
_RESNET_BACK = {ours: theirs for theirs, ours in RESNET.items()}
_MIDDLE_BACK = {ours: theirs for theirs, ours in MIDDLE.items()}
_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_FIXED_BACK = {theirs: ours for ours, theirs in _FIXED.items()}
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")
_IN_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """Map diffusers' names of a UNet's modules to original names; modules without one are left out.

    >>> original_names(["down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"])
    {'down_blocks.0.resnets.0.conv1': 'input_blocks.1.0.in_layers.2', \
'down_blocks.0.attentions.0.proj_in': 'input_blocks.1.1.proj_in'}
    """
    modules = list(modules)
    blocks = _Blocks(modules)
    named = {module: blocks.name(module) for module in modules}
    return {module: name for module, name in named.items() if name is not None}


class _Blocks:
    """The number of resnets on each level of a UNet, and which levels have attention."""

    def __init__(self, modules: Iterable[str]) -> None:
        parts = {match.group(1, 2, 3, 4) for match in map(_IN_BLOCK.match, modules) if match}
        self._resnets = Counter((side, int(level)) for side, level, part, _ in parts if part == "resnets")
        self._attention = {(side, int(level)) for side, level, part, _ in parts if part == "attentions"}

    def name(self, module: str) -> str | None:
        if module in _FIXED:
            return _FIXED[module]
        if match := _IN_MIDDLE.fullmatch(module):
            middle = _MIDDLE_BACK.get(match[1])
            inner = match[2] if match[1].startswith("attentions") else _RESNET_BACK.get(match[2])
            return f"middle_block.{middle}.{inner}" if middle and inner else None
        if match := _IN_BLOCK.fullmatch(module):
            side, level, part, index, inner = match.groups()
            return self._in_block(side, int(level), part, int(index), inner)
        return None

    def _in_block(self, side: str, level: int, part: str, index: int, inner: str | None) -> str | None:
        before = sum(self._resnets[side, lower] + (side == "down") for lower in range(level))
        block = f"input_blocks.{1 + before + index}" if side == "down" else f"output_blocks.{before + index}"
        if part == "resnets":
            return f"{block}.0.{_RESNET_BACK[inner]}" if inner in _RESNET_BACK else None
        if part == "attentions":
            return f"{block}.1.{inner}" if inner else None
        if part == "downsamplers":
            return f"input_blocks.{1 + before + self._resnets[side, level]}.0.op" if inner == "conv" else None
        last = before + self._resnets[side, level] - 1
        position = 2 if (side, level) in self._attention else 1
        return f"output_blocks.{last}.{position}.conv" if inner == "conv" else None


BlockPosition = tuple[int, int]
"""Level and index in it of a resnet; a downsampler has the index of the next resnet."""


def converter(tensors: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function from original to diffusers' names of a UNet (or of its encoder alone); None for other modules.

    `tensors` are all names in the file: a down- or upsampler ends a level.

    >>> converter(["output_blocks.0.0.in_layers.2.weight"])("output_blocks.0.0.in_layers.2")
    'up_blocks.0.resnets.0.conv1'
    """
    tensors = set(tensors)
    down = _positions(tensors, "input_blocks.", _DOWNSAMPLER, 1)
    up = _positions(tensors, "output_blocks.", _UPSAMPLER, 0)

    def convert(module: str) -> str | None:
        if module in _FIXED_BACK:
            return _FIXED_BACK[module]
        block, index, inner = (*module.split(".", 2), "", "")[:3]
        if block == "middle_block" and index in MIDDLE:
            part = inner if index == "1" else RESNET.get(inner)
            return f"mid_block.{MIDDLE[index]}.{part}" if part else None
        positions = {"input_blocks": down, "output_blocks": up}.get(block, {})
        position = positions.get(int(index)) if index.isdecimal() else None
        if position is None:
            return None
        return _input_block(position, inner) if block == "input_blocks" else _output_block(position, inner)

    return convert


def _positions(tensors: set[str], start: str, sampler: re.Pattern[str], first: int) -> dict[int, BlockPosition]:
    """Return the position of each block from `first` on."""
    indices = {int(name.split(".")[1]) for name in tensors if name.startswith(start) and name.split(".")[1].isdecimal()}
    samplers = {int(match[1]) for name in tensors if (match := sampler.match(name))}
    positions: dict[int, BlockPosition] = {}
    level = within = 0
    for index in range(first, max(indices, default=first - 1) + 1):
        positions[index] = (level, within)
        level, within = (level + 1, 0) if index in samplers else (level, within + 1)
    return positions


def _input_block(position: BlockPosition, inner: str) -> str | None:
    level, within = position
    if inner == "0.op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    return _in_level(f"down_blocks.{level}", within, inner)


def _output_block(position: BlockPosition, inner: str) -> str | None:
    level, within = position
    if inner in {"1.conv", "2.conv"}:
        return f"up_blocks.{level}.upsamplers.0.conv"
    return _in_level(f"up_blocks.{level}", within, inner)


def _in_level(block: str, within: int, inner: str) -> str | None:
    part, _, rest = inner.partition(".")
    if part == "0" and rest in RESNET:
        return f"{block}.resnets.{within}.{RESNET[rest]}"
    return f"{block}.attentions.{within}.{rest}" if part == "1" and rest else None
