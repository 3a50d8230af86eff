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
    """Overrides of a call: `Overrides` in torch, `DenseOverrides` in an exported graph."""

    def within(self, embeddings: Tensor) -> Tensor:
        """Return embeddings `(rows, T, C)` with the overridden ones replaced."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Vectors for k tokens of a call, which replace those of the embedding table.

    vectors (k, C), row (k,) and position (k,) int64; no (row, position) occurs twice.
    """

    vectors: Tensor
    row: Tensor
    position: Tensor

    def within(self, embeddings: Tensor) -> Tensor:
        return embeddings.index_put((self.row, self.position), self.vectors)


@dataclass(frozen=True, slots=True)
class TextInputs:
    """The inputs of a text encoder.

    tokens (rows, 77) int64; overrides replace some of their embeddings; `skip` leaves out that many more of the last
    layers (clip skip); mask (rows, 77) is 0 where a token is not visible, or None if all are.
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
    """An encoder's output: states (rows, 77, C); pooled (rows, E), one vector per text, from an encoder
    that projects.
    """

    states: Tensor
    pooled: Tensor | None = None


@dataclass(slots=True)
class OverrideInput:
    """The place from which the token embedding reads this call's overrides. Owned by one thread at a time."""

    overrides: Replaces | None = None


class OverriddenEmbedding(nn.Module):
    """The token embedding with overrides as an input. Its table is never changed.

    Vectors replace the looked-up ones before positions are added, as rows of the table would.
    """

    def __init__(self, base: nn.Embedding, source: OverrideInput) -> None:
        super().__init__()
        self.base = base
        self.source = source

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens `(rows, T)` int64 as `(rows, T, C)`."""
        embeddings: Tensor = self.base(tokens)
        overrides = self.source.overrides
        return embeddings if overrides is None else overrides.within(embeddings)


class TextEncoder(nn.Module):
    """Encodes token ids as a UNet reads them: the last layer's states, or (`penultimate`) the last but one, unnormed.

    `component` is the encoder's name in a base: `text_encoder` or `text_encoder_2`.
    """

    def __init__(
        self,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        component: str = "text_encoder",
        *,
        penultimate: bool = False,
    ) -> None:
        super().__init__()
        # transformers ≥ 5.6 flattened CLIPTextModel; files and our names always contain `text_model.`.
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
