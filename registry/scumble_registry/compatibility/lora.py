"""What a LoRA, or a relative of it, needs of a base."""

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
    """The base's, if one was named; else by the width of the text context, else None."""
    requires: dict[str, Shape]
    """Every target that it changes, norms among them, with the shape of its weight."""
    ranks: dict[str, int]
    """Of those that factors in a row say, how many columns they need; 0 where the weight is only stretched."""
    magnitudes: bool = False
    """Rows stretch or mix weights (DoRA, IA³, GLoRA), at least in part: what it does depends on the base's."""
    merged: tuple[str, ...] = ()
    """Targets that no factors say, sorted: they are merged into copies of the base's weights."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plain LoRA's manifest, and so its digest, is what it was before there were DoRAs and others."""
        data: dict[str, Any] = serialise(self)
        later = {"magnitudes": self.magnitudes, "merged": self.merged}
        return {key: value for key, value in data.items() if later.get(key, True)}

    def fits(self, base: BaseCompatibility) -> None:
        """Raises Incompatible, naming the first target (in sorted order) that does not match, and both
        shapes.
        """
        check_targets(self.requires, base)
        if self.magnitudes and (padded := [name for name in self.requires if is_padded(name, self.requires, base)]):
            raise Incompatible(
                f"the adapter stretches weights and changes {padded[0]} with {base.latent_channels} channels, of which "
                f"this base has {base.in_channels}: its lengths mean another weight; use the base that it was "
                "trained on",
                target=padded[0],
            )
