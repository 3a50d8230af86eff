"""The UNet's modules by the names of the original code (ldm, sgm), which kohya's SDXL files and single files use.

`input_blocks` count everything that leaves a skip connection: the first convolution, then each level's resnets (with
their attention) and its downsampler. `output_blocks` count resnets, and a level's upsampler stands in its last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""What a resnet's parts are called there → in diffusers."""
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
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
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")
_IN_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """diffusers' name of each of a UNet's modules → its original name; those that have none are left out.

    >>> original_names(["down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"])
    {'down_blocks.0.resnets.0.conv1': 'input_blocks.1.0.in_layers.2', \
'down_blocks.0.attentions.0.proj_in': 'input_blocks.1.1.proj_in'}
    """
    modules = list(modules)
    blocks = _Blocks(modules)
    named = {module: blocks.name(module) for module in modules}
    return {module: name for module, name in named.items() if name is not None}


class _Blocks:
    """How many resnets each level of a UNet has, and which levels have attention."""

    def __init__(self, modules: Iterable[str]) -> None:
        places = {match.group(1, 2, 3, 4) for match in map(_IN_BLOCK.match, modules) if match}
        self._resnets = Counter((side, int(level)) for side, level, part, _ in places if part == "resnets")
        self._attention = {(side, int(level)) for side, level, part, _ in places if part == "attentions"}

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
        before = sum(self._resnets[side, each] + (side == "down") for each in range(level))
        block = f"input_blocks.{1 + before + index}" if side == "down" else f"output_blocks.{before + index}"
        if part == "resnets":
            return f"{block}.0.{_RESNET_BACK[inner]}" if inner in _RESNET_BACK else None
        if part == "attentions":
            return f"{block}.1.{inner}" if inner else None
        if part == "downsamplers":
            return f"input_blocks.{1 + before + self._resnets[side, level]}.0.op" if inner == "conv" else None
        last = before + self._resnets[side, level] - 1
        place = 2 if (side, level) in self._attention else 1
        return f"output_blocks.{last}.{place}.conv" if inner == "conv" else None
