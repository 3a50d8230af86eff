"""IP-Adapter files count the attentions of a UNet: here is the order in which they do.

It is diffusers' `unet.attn_processors`, in which modules stand as they were registered: down blocks, up blocks, the
middle block LAST. In each transformer block self-attention (even index) precedes cross-attention (odd). SD 1.5 has
32 of them, SDXL 140.
"""

from __future__ import annotations

import re

from scumble_registry.compatibility import BaseCompatibility

_PLACE = re.compile(
    r"unet\.(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn([12])"
)
_SIDES = {"down": 0, "up": 1, None: 2}


def attentions(base: BaseCompatibility) -> list[str]:
    """Canonical names, e.g. `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2`; [k] has index k."""
    names = {match[0] for target in base.targets if (match := _PLACE.match(target))}
    return sorted(names, key=_order)


def _order(name: str) -> tuple[int, ...]:
    match = _PLACE.fullmatch(name)
    assert match is not None
    return (_SIDES[match[1]], *(int(number or 0) for number in match.groups()[1:]))
