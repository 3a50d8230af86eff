"""Textual inversion: vectors of an embedding stand in the prompt where its name is written.

The tokenizer and the embedding table stay as they are: the name's places hold a filler, and the vectors come as an
input of the text encoder (Gal et al., 2208.01618, served per request). A weight multiplies the vectors, which
neither paper nor diffusers has; 1 is the embedding as it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scumble.errors import InvalidRequest
from scumble_build.graphs.arrays import as_tensor
from scumble_registry.compatibility import TextualInversionCompatibility
from scumble_registry.formats.textual_inversion import KIND, TextualInversionRecord, read_record
from scumble_server.base import Base
from scumble_server.methods.context import Context
from scumble_server.methods.method import Method
from scumble_server.prompts.tokens import PromptWord
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings


class TextualInversionMethod(Method):
    kind = KIND
    fields = frozenset({"text_weight", "token"})

    def read_record(self, path: Path) -> TextualInversionRecord:
        return read_record(path)

    def check_together(self, adapters: Sequence[ResolvedAdapter], base: Base, settings: Settings) -> None:  # noqa: ARG002
        """Two embeddings cannot share a name in one request."""
        first: dict[str, ResolvedAdapter] = {}
        for adapter in adapters:
            token = self.word(adapter).token
            other = first.setdefault(" ".join(token.casefold().split()), adapter)
            if other is not adapter:
                raise InvalidRequest(
                    f"{other.spec.ref} and {adapter.spec.ref} both stand for {token!r}; give one of them another token",
                    field="adapters.token",
                )

    def idle(self, adapter: ResolvedAdapter, steps: int) -> str | None:  # noqa: ARG002 - the text encoder has no steps
        return None if adapter.text_weight else "weight 0"

    def word(self, adapter: ResolvedAdapter) -> PromptWord:
        """The request's token, or else the registry's, and how many places in the prompt it takes."""
        compatibility = adapter.version.manifest.compatibility
        assert isinstance(compatibility, TextualInversionCompatibility)
        return PromptWord(adapter.spec.token or compatibility.token, compatibility.vectors)

    def vectors(self, context: Context, adapter: ResolvedAdapter, component: str) -> Tensor:
        return as_tensor(context.record(adapter, read_record)[component]) * adapter.text_weight

    def describe(self, adapter: ResolvedAdapter) -> dict[str, Any]:
        word = self.word(adapter)
        return {"token": word.token, "vectors": word.vectors}
