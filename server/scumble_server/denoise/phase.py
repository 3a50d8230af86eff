"""A phase of a request: a stretch of its steps in which the same adapters and texts act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from scumble_build.graphs.includes import Include
from scumble_server.executors.protocol import Executor
from scumble_server.factors.rows import RowFactors
from scumble_server.methods.part import Part


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """What the model rows of one image carry in a phase.

    `executor` holds the weights: the base's, or a variant's. kv `(rows, T, K)` for each model row: the prompt alone, or
    the negative prompt and then the prompts that act against it. `parts` has what the methods carry beside factors, by
    kind. pooled `(rows, E)` and `sizes` are SDXL's (`StepInputs`).
    """

    executor: Executor
    kv: Tensor
    factors: RowFactors | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    pooled: Tensor | None = None
    sizes: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        return self.kv.shape[0]

    @property
    def everything(self) -> tuple[Part, ...]:
        """Factors, if there are any, and the other parts."""
        return (*([self.factors] if self.factors is not None else []), *self.parts.values())

    @property
    def includes(self) -> frozenset[Include]:
        """The optional inputs that a graph must have to take a step of this phase."""
        return frozenset[Include]().union(*(part.includes for part in self.everything))

    @property
    def axes(self) -> dict[str, int]:
        """What its rows alone ask of a graph's axes; a batch asks for no more than the most of its rows."""
        axes = {"tokens": self.kv.shape[1]}
        for part in self.everything:
            axes |= part.sizes
        return axes
