"""The order in which IP-Adapter files number the attentions of a UNet.

It is the order of diffusers' `unet.attn_processors`: down blocks, up blocks, and the middle block LAST. In each
transformer block self-attention (even index) precedes cross-attention (odd). SD 1.5 has 32 attentions, SDXL 140.
"""

from __future__ import annotations

import re

from scumble_registry.compatibility import BaseCompatibility

_ATTENTION = re.compile(
    r"unet\.(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn([12])"
)
_SIDES = {"down": 0, "up": 1, None: 2}


def attentions(base: BaseCompatibility) -> list[str]:
    """Return canonical names by index, e.g. `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2`."""
    names = {match[0] for target in base.targets if (match := _ATTENTION.match(target))}
    return sorted(names, key=_order)


def _order(name: str) -> tuple[int, ...]:
    match = _ATTENTION.fullmatch(name)
    assert match is not None
    return (_SIDES[match[1]], *(int(number or 0) for number in match.groups()[1:]))
