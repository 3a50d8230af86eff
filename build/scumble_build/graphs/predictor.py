"""A network that reads a picture or a text and predicts a LoRA (after HyperDreamBooth, Ruiz et al., 2307.06949).

A transformer decoder with one learned query for each target attends to the condition's states. Its head predicts each
target's coefficients, which are fed back `passes` times. What the coefficients mean is in
`scumble_registry/formats/hypernetwork/predictor.py`. Trainers train this module, the server runs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scumble_build.graphs.arrays import as_tensor
from scumble_registry.formats.hypernetwork.predictor import (
    FEED_FORWARD,
    PredictorConfig,
    PredictorRecord,
    make_record,
)
from scumble_registry.formats.safetensors_header import Array

PredictedFactors = dict[str, tuple[Tensor, Tensor, float]]
"""Target → down (r, in), up (out, r) and alpha."""


class Predictor(nn.Module):
    """The network, and the frozen auxiliary matrices that its coefficients multiply.

    `up[target]` (out, a) and `down[target]` (b, in).
    """

    def __init__(
        self, config: PredictorConfig, condition_width: int, up: Mapping[str, Tensor], down: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.condition = nn.Linear(condition_width, width)
        self.queries = nn.Parameter(torch.randn(len(config.targets), width) * width**-0.5)
        self.feedback = nn.Linear(config.coefficients, width)
        layer = nn.TransformerDecoderLayer(
            width, config.heads, FEED_FORWARD * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.depth, nn.LayerNorm(width))
        self.head = nn.Linear(width, config.coefficients)
        for index, target in enumerate(config.targets):
            self.register_buffer(f"up_{index}", up[target], persistent=False)
            self.register_buffer(f"down_{index}", down[target], persistent=False)

    def forward(self, condition: Tensor) -> Tensor:
        """Predict coefficients `(n, T, r (a + b))` from the condition's states `(n, N, C)`."""
        memory = self.condition(condition)
        queries = self.queries.expand(len(condition), -1, -1)
        coefficients = queries.new_zeros(*queries.shape[:2], self.config.coefficients)
        for _ in range(self.config.passes):
            coefficients = self.head(self.decoder(queries + self.feedback(coefficients), memory))
        return coefficients

    def expand(self, coefficients: Tensor) -> PredictedFactors:
        """Turn one condition's coefficients `(T, r (a + b))` into factors. Differentiable."""
        rank, a, b = self.config.rank, self.config.a, self.config.b
        factors: PredictedFactors = {}
        for index, (target, own) in enumerate(zip(self.config.targets, coefficients, strict=True)):
            A, B = own[: a * rank].view(a, rank), own[a * rank :].view(rank, b)
            up, down = self.get_buffer(f"up_{index}") @ A, B @ self.get_buffer(f"down_{index}")
            factors[target] = (down, up, self.config.alpha)
        return factors

    @torch.no_grad()
    def predict(self, condition: Tensor) -> PredictedFactors:
        """Predict the LoRA for one condition, states `(1, N, C)`."""
        return self.expand(self(condition)[0])

    @classmethod
    def of(cls, record: PredictorRecord) -> Predictor:
        """Build the network of a record, in float32 and frozen; nothing is drawn at random."""
        with torch.device("meta"):
            made = cls(record.config, record.condition_width, _tensors(record.up), _tensors(record.down))
        made.load_state_dict(_tensors(record.network), assign=True)
        return made.eval().requires_grad_(False)

    def record(self) -> PredictorRecord:
        """Return the record that `write_record` writes. `Predictor.of(p.record())` predicts what p predicts."""
        tensors = dict(self.state_dict())
        for index, target in enumerate(self.config.targets):
            for side in ("up", "down"):
                tensors[f"aux.{target}.{side}"] = self.get_buffer(f"{side}_{index}")
        return make_record(
            {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}, self.config
        )


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: as_tensor(values) for name, values in arrays.items()}
