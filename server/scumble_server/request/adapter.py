"""An adapter of a request, once its reference is resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from scumble.request import Adapter
from scumble_registry import Version
from scumble_server.request.block_weights import BlockWeights
from scumble_server.request.pictures import Picture


@dataclass(frozen=True, slots=True)
class Bound:
    """One adapter of a request, resolved to a version. Every later step goes by its digest.

    What its `images` and `masks` name: pictures, or tensors for adapters that take embeddings, in their order.
    """

    spec: Adapter
    version: Version
    blocks: BlockWeights | None
    pictures: tuple[Picture, ...] = ()
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    masks: tuple[Picture, ...] = ()

    @property
    def kind(self) -> str:
        return self.version.manifest.kind

    @property
    def text_weight(self) -> float:
        return self.spec.weight if self.spec.text_weight is None else self.spec.text_weight

    def why_never(self, steps: int) -> str | None:
        """Why an adapter that follows the steps acts in none of them, or None."""
        spec = self.spec
        if spec.weight == 0:
            return "weight 0"
        if not any(spec.is_active(step, steps) for step in range(steps)):
            return f"no step of {steps} lies between start {spec.start:g} and end {spec.end:g}"
        return None
