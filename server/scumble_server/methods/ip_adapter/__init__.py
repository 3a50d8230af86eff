"""IP-Adapter: pictures become keys and values beside the text's, in every cross-attention (Ye et al., 2308.06721).

Several pictures in one adapter share a softmax, as in diffusers; where they have masks, each has its own, and so has
each adapter. FaceID kinds read embeddings that the caller brings; their LoRA joins the request's LoRAs at the
adapter's weight, so that weight 0 is the base (in diffusers it stays).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scumble.errors import InvalidRequest
from scumble_registry.formats.ip_adapter import KIND, read_record
from scumble_server.base import Base
from scumble_server.methods import image_encoders
from scumble_server.methods.context import Context, Text
from scumble_server.methods.ip_adapter.inputs import check_inputs, compatibility_of, picture_count, scales_of
from scumble_server.methods.ip_adapter.part import ImagesPart
from scumble_server.methods.method import Lora, Method
from scumble_server.request.adapter import ResolvedAdapter


class IpAdapterMethod(Method):
    kind = KIND
    fields = frozenset({"images", "masks", "scale", "blocks", "start", "end"})

    def read_record(self, path: Path) -> Any:
        return read_record(path)

    def check(self, adapter: ResolvedAdapter, base: Base) -> None:
        """Pictures, embeddings and masks must be there, fit, and be as many as each other.

        Raises InvalidRequest, or Refused where there is no image encoder.
        """
        check_inputs(adapter)
        count = picture_count(adapter)
        if len(adapter.masks) not in {0, count}:
            raise InvalidRequest(
                f"{adapter.spec.ref}: {len(adapter.masks)} masks for {count} pictures; name one for each, or none",
                field="adapters.masks",
            )
        scales_of(adapter)
        image_encoders.check(adapter, base)

    def lora(self, adapter: ResolvedAdapter) -> Lora | None:
        """A FaceID's own."""
        compatibility = compatibility_of(adapter).lora
        if compatibility is None:
            return None
        return Lora(adapter, compatibility, lambda context: context.record(adapter, read_record).lora)

    def carry(self, context: Context, weights: Mapping[ResolvedAdapter, float], text: Text) -> ImagesPart | None:  # noqa: ARG002
        return ImagesPart.of(context, weights)

    def layers(self, context: Context, adapter: ResolvedAdapter) -> int:  # noqa: ARG002
        """The cross-attentions in which any of its pictures has a scale."""
        return len({name for of_picture in scales_of(adapter) for name, scale in of_picture.items() if scale})

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:
        compatibility = compatibility_of(adapter)
        return {
            "projection": compatibility.projection,
            "pictures": [picture.digest for picture in adapter.pictures],
            "masks": [mask.digest for mask in adapter.masks],
            "image_encoder": image_encoders.source_of(adapter),
            **({"rank": max(compatibility.lora.ranks.values())} if compatibility.lora is not None else {}),
        }
