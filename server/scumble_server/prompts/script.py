"""A text as the encoders of one base read it."""

from __future__ import annotations

from dataclasses import dataclass

from scumble_server.prompts.compel import CompelPrompt
from scumble_server.prompts.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Script:
    """A text as each of the base's encoders reads it, or None where zeros stand for it; `clip_skip` of the last
    layers are left out.
    """

    of_encoder: tuple[Tokens | CompelPrompt, ...] | None
    clip_skip: int

    @property
    def chunks(self) -> int:
        return max((text.chunks for text in self.of_encoder or ()), default=0)

    @property
    def used(self) -> frozenset[int]:
        """The embeddings whose name is written in it."""
        return frozenset[int]().union(*(text.used for text in self.of_encoder or ()))
