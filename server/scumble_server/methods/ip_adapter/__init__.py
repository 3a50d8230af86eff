"""IP-Adapter: pictures become keys and values beside the text's, in every cross-attention (Ye et al., 2308.06721).

Several pictures in one adapter share a softmax, as in diffusers; where they have masks, each has its own, and so has
each adapter. FaceID kinds read embeddings that the caller brings; their LoRA joins the request's LoRAs at the
adapter's weight, so that weight 0 is the base (in diffusers it stays).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scumble.errors import InvalidRequest
from scumble_registry.formats.ip_adapter import KIND, read_record
from scumble_server.base import Base
from scumble_server.methods import image_encoders
from scumble_server.methods.ip_adapter.inputs import check_inputs, compatibility_of, picture_count, scales_of
from scumble_server.methods.ip_adapter.keys_values import Groups, groups, row_images
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings

FIELDS = frozenset({"images", "masks", "scale", "blocks", "start", "end"})


def check(bound: Bound, base: Base) -> None:
    """Pictures, embeddings and masks must be there, fit, and be as many as each other.

    Raises InvalidRequest, or Refused where there is no image encoder.
    """
    check_inputs(bound)
    count = picture_count(bound)
    if len(bound.masks) not in {0, count}:
        raise InvalidRequest(
            f"{bound.spec.ref}: {len(bound.masks)} masks for {count} pictures; name one for each, or none",
            field="adapters.masks",
        )
    scales_of(bound)
    image_encoders.check(bound, base)


def check_together(adapters: Sequence[Bound], base: Base, settings: Settings) -> None:
    """Any number may act at once."""


def idle(bound: Bound, steps: int) -> str | None:
    return bound.why_never(steps)


def describe(bound: Bound) -> dict[str, Any]:
    compatibility = compatibility_of(bound)
    return {
        "projection": compatibility.projection,
        "pictures": [picture.digest for picture in bound.pictures],
        "masks": [mask.digest for mask in bound.masks],
        "image_encoder": image_encoders.source_of(bound),
        **({"rank": max(compatibility.lora.ranks.values())} if compatibility.lora is not None else {}),
    }


__all__ = [
    "FIELDS",
    "KIND",
    "Groups",
    "check",
    "check_together",
    "describe",
    "groups",
    "idle",
    "read_record",
    "row_images",
]
