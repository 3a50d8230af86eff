"""Compatibility of a checkpoint with a base."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family, PredictionType


class DreamboothCompatibility(Compatibility):
    """A checkpoint that runs in the base's graphs with its own weights."""

    kind: Literal["dreambooth"] = "dreambooth"
    family: Family
    prediction_type: PredictionType
    in_channels: int
    cross_attention_dim: int
    text_widths: tuple[int, ...]
    scheduler: dict[str, JsonValue]
    """The checkpoint's own scheduler config."""
    changed: dict[str, int]
    """Component → number of values that differ from the base's."""

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible. Shapes were checked against the base that it was published for."""
        for name in ("family", "in_channels", "cross_attention_dim", "text_widths"):
            if getattr(self, name) != getattr(base, name):
                raise Incompatible(
                    f"the checkpoint has {name} {getattr(self, name)}, this base {getattr(base, name)}; "
                    "use the base that it was published for",
                    field=name,
                )
