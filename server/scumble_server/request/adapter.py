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


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedAdapter:
    """One adapter of a request with the version that its reference names; all later steps go by the version's digest.

    `pictures`, `tensors` and `masks` are what `spec.images` and `spec.masks` name, in that order; adapters that read
    embeddings have tensors. Two are equal only if they are the same object: a request may name one version twice.
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
        """Its weight in the text encoders."""
        return self.spec.weight if self.spec.text_weight is None else self.spec.text_weight

    def why_never(self, steps: int) -> str | None:
        """Say why it acts in none of `steps` steps, or None if it acts in some."""
        spec = self.spec
        if spec.weight == 0:
            return "weight 0"
        if not any(spec.is_active(step, steps) for step in range(steps)):
            return f"no step of {steps} lies between start {spec.start:g} and end {spec.end:g}"
        return None
