"""Compatibility of a LoRA or a related algorithm (LoHa, LoKr, DoRA, IA³ …) with a base."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family
from scumble_registry.compatibility.shapes import Shape
from scumble_registry.compatibility.targets import check_targets, is_padded


class LoraCompatibility(Compatibility):
    kind: Literal["lora"] = "lora"
    family: Family | None
    """The base's family, if a base was named; else by the width of the text context, else None."""
    requires: dict[str, Shape]
    """Every target that it changes, norms included → the shape of its weight."""
    ranks: dict[str, int]
    """Target that is served by factors in a row → its rank columns; 0 where the base's weight is only scaled."""
    magnitudes: bool = False
    """Whether some change depends on the base's weights, which it scales or mixes (DoRA, IA³, GLoRA)."""
    merged: tuple[str, ...] = ()
    """Targets whose change has no low-rank factors, sorted: it is merged into copies of the base's weights."""

    idle: bool = False
    """Whether every change in it is zero, so that it changes no picture."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave newer fields out where they are empty, so that the digests of plain LoRAs do not change."""
        data: dict[str, Any] = serialise(self)
        later = {"magnitudes": self.magnitudes, "merged": self.merged, "idle": self.idle}
        return {key: value for key, value in data.items() if later.get(key, True)}

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible with the first target (in sorted order) that differs, and both shapes."""
        check_targets(self.requires, base)
        if self.magnitudes and (padded := [name for name in self.requires if is_padded(name, self.requires, base)]):
            raise Incompatible(
                f"the adapter scales the base's weights and changes {padded[0]} with {base.latent_channels} channels, "
                f"but this base's has {base.in_channels}, so its norms differ; use the base that it was trained on",
                target=padded[0],
            )
