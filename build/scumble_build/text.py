"""The CLIP text encoder with factors and token overrides as inputs (Radford et al., 2103.00020; transformers' own
layers).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import CLIPTextModel

from scumble_build.adapted import Factors, adapt, find_layers

PREFIX = "text_encoder.text_model."


@dataclass(frozen=True, slots=True)
class Overrides:
    """Vectors that stand at k places of a call's tokens instead of what the embedding table says.

    vectors (k, C), row (k,) and position (k,) int64; a place is named once at most.
    """

    vectors: Tensor
    row: Tensor
    position: Tensor


@dataclass(slots=True)
class OverrideInput:
    """Where the token embedding reads this call's overrides. Owned by one thread at a time."""

    overrides: Overrides | None = None


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
        if overrides is None:
            return embeddings
        return embeddings.index_put((overrides.row, overrides.position), overrides.vectors)


class TextEncoder(nn.Module):
    """Token ids → states of the last layer, or of one before it, as SD 1.x reads them."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        # transformers ≥ 5.6 flattened CLIPTextModel; files and our names always say `text_model.`.
        tower = model.get_submodule("text_model") if hasattr(model, "text_model") else model
        encoder, embeddings = tower.get_submodule("encoder"), tower.get_submodule("embeddings")
        layers = find_layers(encoder, PREFIX + "encoder.")
        self.model = model
        self.layout, self.source = adapt(encoder, layers, PREFIX + "encoder.")
        self.layers = sum(1 for _ in encoder.get_submodule("layers").children())
        self.norm = tower.get_submodule("final_layer_norm")
        self.override_input = OverrideInput()
        table = embeddings.get_submodule("token_embedding")
        assert isinstance(table, nn.Embedding)
        embeddings.add_module("token_embedding", OverriddenEmbedding(table, self.override_input))

    def forward(
        self,
        tokens: Tensor,
        factors: Factors | None = None,
        overrides: Overrides | None = None,
        clip_skip: int = 0,
    ) -> Tensor:
        """tokens `(rows, 77)` int64 → `(rows, 77, C)`; `clip_skip` layers, at most all, are left out at the end."""
        self.source.factors = factors
        self.override_input.overrides = overrides
        if not clip_skip:
            last: Tensor = self.model(tokens, return_dict=True).last_hidden_state
            return last
        found = self.model(tokens, return_dict=True, output_hidden_states=True)
        states: Tensor = self.norm(found.hidden_states[-(clip_skip + 1)])
        return states
