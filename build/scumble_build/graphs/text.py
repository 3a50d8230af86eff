"""CLIP's text encoders with factors and token overrides as inputs (Radford et al., 2103.00020; transformers' own
layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scumble_build.graphs.adapted import Factors, adapt, find_layers
from scumble_build.graphs.tensors import moved


class Replaces(Protocol):
    """Overrides in one of the forms that a graph may be given them in."""

    def within(self, embeddings: Tensor) -> Tensor:
        """`(rows, T, C)` with what overrides them."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Vectors that stand at k places of a call's tokens instead of what the embedding table says.

    vectors (k, C), row (k,) and position (k,) int64; a place is named once at most.
    """

    vectors: Tensor
    row: Tensor
    position: Tensor

    def within(self, embeddings: Tensor) -> Tensor:
        return embeddings.index_put((self.row, self.position), self.vectors)


@dataclass(frozen=True, slots=True)
class TextInputs:
    """What rows carry into a text encoder.

    tokens (rows, 77) int64; overrides stand for some of them; `skip` leaves out that many more of the last layers
    (clip skip); mask (rows, 77) is 0 where a token is not seen, or None where all are.
    """

    tokens: Tensor
    factors: Factors | None = None
    overrides: Overrides | None = None
    skip: int = 0
    mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> TextInputs:
        return moved(self, device, dtype)


@dataclass(frozen=True, slots=True)
class EncodedText:
    """states (rows, 77, C); pooled (rows, E), one vector for the whole text, from an encoder that projects."""

    states: Tensor
    pooled: Tensor | None = None


@dataclass(slots=True)
class OverrideInput:
    """Where the token embedding reads this call's overrides. Owned by one thread at a time."""

    overrides: Replaces | None = None


class OverriddenEmbedding(nn.Module):
    """The token embedding with overrides as an input. Its table is only ever read.

    Vectors replace what was looked up before positions are added, as rows of the table itself would.
    """

    def __init__(self, base: nn.Embedding, source: OverrideInput) -> None:
        super().__init__()
        self.base = base
        self.source = source

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `(rows, T)` int64 → `(rows, T, C)`."""
        embeddings: Tensor = self.base(tokens)
        overrides = self.source.overrides
        return embeddings if overrides is None else overrides.within(embeddings)


class TextEncoder(nn.Module):
    """Token ids → states as a UNet reads them: of the last layer, or (`penultimate`) of the last but one, unnormed.

    `component` is the encoder's place in a base: `text_encoder` or `text_encoder_2`.
    """

    def __init__(
        self,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        component: str = "text_encoder",
        *,
        penultimate: bool = False,
    ) -> None:
        super().__init__()
        # transformers ≥ 5.6 flattened CLIPTextModel; files and our names always say `text_model.`.
        tower = model.get_submodule("text_model") if hasattr(model, "text_model") else model
        encoder, embeddings = tower.get_submodule("encoder"), tower.get_submodule("embeddings")
        prefix = f"{component}.text_model.encoder."
        self.model = model
        self.tower = tower
        self.penultimate = penultimate
        self.norm = tower.get_submodule("final_layer_norm")
        self.layout, self.source = adapt(encoder, find_layers(encoder, prefix), prefix)
        self.override_input = OverrideInput()
        table = embeddings.get_submodule("token_embedding")
        assert isinstance(table, nn.Embedding)
        embeddings.add_module("token_embedding", OverriddenEmbedding(table, self.override_input))

    def forward(self, inputs: TextInputs) -> EncodedText:
        self.source.factors = inputs.factors
        self.override_input.overrides = inputs.overrides
        output = self.model(inputs.tokens, attention_mask=inputs.mask, output_hidden_states=True, return_dict=True)
        pooled: Tensor | None = getattr(output, "text_embeds", None)
        if not inputs.skip and not self.penultimate:
            return EncodedText(output.last_hidden_state, pooled)
        states: Tensor = output.hidden_states[-(1 + self.penultimate + inputs.skip)]
        return EncodedText(states if self.penultimate else self.norm(states), pooled)
