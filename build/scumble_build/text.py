"""The CLIP text encoder with factors as an input (Radford et al., 2103.00020; transformers' own layers)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPTextModel

from scumble_build.adapted import Factors, adapt, find_layers

PREFIX = "text_encoder.text_model."


class TextEncoder(nn.Module):
    """Token ids → states of the last layer, as SD 1.x reads them."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        # transformers ≥ 5.6 flattened CLIPTextModel; files and our names always say `text_model.`.
        encoder = (model.get_submodule("text_model") if hasattr(model, "text_model") else model).get_submodule(
            "encoder"
        )
        layers = find_layers(encoder, PREFIX + "encoder.")
        self.model = model
        self.layout, self.source = adapt(encoder, layers, PREFIX + "encoder.")

    def forward(self, tokens: Tensor, factors: Factors | None = None) -> Tensor:
        """tokens `(rows, 77)` int64 → `(rows, 77, C)`."""
        self.source.factors = factors
        states: Tensor = self.model(tokens, return_dict=True).last_hidden_state
        return states
