"""Convert the VAE's original names (without `first_stage_model.`) to diffusers' names.

The original counts the decoder's levels from the pixels, diffusers from the latents; attention's matrices are 1x1
convolutions in the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from scumble_registry.formats.safetensors_header import Array

_SIDE = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block|downsample|upsample)\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block_1|block_2|attn_1)\.(.+)")
_END = re.compile(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)")
_MIDDLE_PARTS = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ALONE = frozenset({"quant_conv", "post_quant_conv"})


def convert(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
    """Return the tensors by diffusers' names, and the unknown names."""
    levels = _levels(tensors)
    renamed: dict[str, Array] = {}
    unknown: list[str] = []
    for name, values in tensors.items():
        module, _, role = name.rpartition(".")
        ours = _module(module, levels)
        if ours is None:
            unknown.append(name)
        else:
            is_matrix = ".attentions." in ours and values.ndim == 4
            renamed[f"{ours}.{role}"] = values.reshape(values.shape[:2]) if is_matrix else values
    return renamed, unknown


def _levels(names: Iterable[str]) -> int:
    return 1 + max((int(match[3]) for name in names if (match := _SIDE.match(name))), default=0)


def _module(module: str, levels: int) -> str | None:
    if module in _ALONE:
        return module
    if match := _END.fullmatch(module):
        return f"{match[1]}.{'conv_norm_out' if match[2] == 'norm_out' else match[2]}"
    if match := _MIDDLE.fullmatch(module):
        part = _ATTENTION.get(match[3]) if match[2] == "attn_1" else _resnet(match[3])
        return f"{match[1]}.mid_block.{_MIDDLE_PARTS[match[2]]}.{part}" if part else None
    if match := _SIDE.fullmatch(module):
        side, way, level, part, rest = match.groups()
        index_of_block = int(level) if way == "down" else levels - 1 - int(level)
        block = f"{side}.{way}_blocks.{index_of_block}"
        if part == "block":
            index, _, inner = rest.partition(".")
            return f"{block}.resnets.{index}.{_resnet(inner)}"
        return f"{block}.{part}rs.0.conv" if rest == "conv" else None
    return None


def _resnet(inner: str) -> str:
    return "conv_shortcut" if inner == "nin_shortcut" else inner
