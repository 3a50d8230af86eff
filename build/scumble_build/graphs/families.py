"""The differences between the families of Stable Diffusion, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scumble_registry.compatibility import Family as FamilyName


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text encoder of a base, by the folders of its files."""

    encoder: str
    tokenizer: str
    projects: bool = False
    """Whether it also returns one vector for the whole prompt (`text_embeds`)."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of bases. `texts` are in the order in which their states are concatenated for the UNet."""

    texts: tuple[TextPart, ...]
    penultimate: bool = False
    """Whether the UNet reads the last layer but one, without the final norm. (SD 2.x reads it too, but its files leave
    the last layer out and keep the norm.)
    """
    sizes: bool = False
    """Whether the UNet also reads the pooled text and the image's sizes (SDXL's time ids)."""


_FIRST = TextPart("text_encoder", "tokenizer")

FAMILIES: Mapping[FamilyName, Family] = {
    "sd1": Family((_FIRST,)),
    "sd2": Family((_FIRST,)),
    "sdxl": Family((_FIRST, TextPart("text_encoder_2", "tokenizer_2", projects=True)), penultimate=True, sizes=True),
}
