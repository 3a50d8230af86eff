"""Textual inversion: vectors of an embedding stand in the prompt where its name is written.

The tokenizer and the embedding table stay as they are: the name's places hold a filler, and the vectors come as an
input of the text encoder (Gal et al., 2208.01618, served per request). A weight multiplies the vectors, which
neither paper nor diffusers has; 1 is the embedding as it was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scumble.errors import InvalidRequest
from scumble_build.graphs.text import Overrides
from scumble_registry.compatibility import TextualInversionCompatibility
from scumble_registry.formats.textual_inversion import KIND, TextualInversionRecord, read_record
from scumble_server.base import Base
from scumble_server.prompts.tokens import Name, Tokens
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings

FIELDS = frozenset({"text_weight", "token"})


def check(bound: Bound, base: Base) -> None:
    """Whatever fits the base can be served."""


def check_together(adapters: Sequence[Bound], base: Base, settings: Settings) -> None:  # noqa: ARG001 - the protocol's
    """Two embeddings cannot share a name in one request."""
    first: dict[str, Bound] = {}
    for bound in adapters:
        name = " ".join(token_of(bound).casefold().split())
        if (other := first.setdefault(name, bound)) is not bound:
            raise InvalidRequest(
                f"{other.spec.ref} and {bound.spec.ref} both stand for {token_of(bound)!r}; "
                "give one of them another token",
                field="adapters.token",
            )


def idle(bound: Bound, steps: int) -> str | None:  # noqa: ARG001 - the text encoder has no steps
    return None if bound.text_weight else "weight 0"


def describe(bound: Bound) -> dict[str, Any]:
    return {"token": token_of(bound), "vectors": count(bound)}


def token_of(bound: Bound) -> str:
    """The word in a prompt that stands for it: the request's, or else the registry's."""
    return bound.spec.token or _compatibility(bound).token


def count(bound: Bound) -> int:
    """How many places in the prompt it takes."""
    return _compatibility(bound).vectors


def names(adapters: Iterable[Bound]) -> list[Name]:
    """What stands in a prompt for the embeddings among these, in their order."""
    return [Name(token_of(each), count(each)) for each in adapters if each.kind == KIND]


def vectors(record: TextualInversionRecord, component: str, weight: float) -> Tensor:
    """What stands in the prompt for one of the base's text encoders: (n, C) float32."""
    return torch.from_numpy(record[component].astype(np.float32)) * weight


def why_unused(bound: Bound, prompts: Iterable[str]) -> str:
    """What the receipt says of an embedding that none of these fields (`prompt`, `negative_prompt`) has use for."""
    fields = " or ".join(field.replace("_", " ") for field in sorted(prompts, reverse=True))
    return f"its token {token_of(bound)!r} occurs in no prompt ({fields})"


def overrides(tokens: Tokens, embeddings: Mapping[int, Tensor]) -> Overrides | None:
    """What the chunks of a prompt carry into the text encoder, each a row there; None if they carry nothing.

    `tokens` says where embedding i, of which `embeddings[i]` (n, C) are the vectors, stands.
    """
    places = [(slot.chunk, slot.position, embeddings[slot.embedding]) for slot in tokens.slots]
    if not places:
        return None
    return Overrides(
        torch.cat([values for _, _, values in places]),
        torch.cat([torch.full((len(values),), row) for row, _, values in places]),
        torch.cat([torch.arange(start, start + len(values)) for _, start, values in places]),
    )


def _compatibility(bound: Bound) -> TextualInversionCompatibility:
    compatibility = bound.version.manifest.compatibility
    assert isinstance(compatibility, TextualInversionCompatibility)
    return compatibility


__all__ = [
    "FIELDS",
    "KIND",
    "check",
    "check_together",
    "count",
    "describe",
    "idle",
    "names",
    "overrides",
    "read_record",
    "token_of",
    "vectors",
    "why_unused",
]
