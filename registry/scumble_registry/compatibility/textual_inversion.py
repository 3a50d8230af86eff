"""Compatibility of a textual-inversion embedding with a base."""

from __future__ import annotations

from typing import Literal

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family
from scumble_registry.compatibility.shapes import show_shape


class TextualInversionCompatibility(Compatibility):
    kind: Literal["textual_inversion"] = "textual_inversion"
    family: Family | None
    """The base's family, if a base was named; else by the widths, else None."""
    widths: tuple[int, ...]
    """Width of the vectors for each text encoder, in the base's order."""
    vectors: int
    """Number of positions in the prompt that its token takes."""
    token: str
    """The word in a prompt that invokes the embedding."""

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming both widths."""
        if self.widths != base.text_widths:
            raise Incompatible(
                f"the embedding has vectors of width {show_shape(self.widths)}, but the text encoders of this "
                f"{base.family} base have {show_shape(base.text_widths)}; use the base that it was trained on",
                adapter_widths=self.widths,
                base_widths=base.text_widths,
            )
