"""What the rows of one request carry into each step from one method: a part of a phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import StepInputs


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The model rows of a batch, image by image: `counts[i]` rows for image i. `device` is the executor's."""

    counts: tuple[int, ...]
    device: str

    @property
    def starts(self) -> list[int]:
        """The first row of each image."""
        return [sum(self.counts[:index]) for index in range(len(self.counts))]


AtEachStep = Callable[[StepInputs, Tensor, Tensor], StepInputs]
"""Adds to the inputs what depends on the step: sample `(rows, 4, h, w)` and timestep `(rows,)`."""


class Part:
    """What one method's adapters become for the rows of one request in one phase: plain tensors, made once.

    A batch has one part or None for each of its images; `stack` makes of them the inputs of one step.
    """

    __slots__ = ()

    @property
    def includes(self) -> frozenset[Include]:
        """The optional inputs that a graph must have to take this part."""
        return frozenset()

    @property
    def sizes(self) -> Mapping[str, int]:
        """What it asks of a graph's axes, by their names; a batch asks for no more than the most of its parts."""
        return {}

    @classmethod
    def stack(cls, parts: Sequence[Self | None], rows: BatchRows, inputs: StepInputs) -> StepInputs:  # noqa: ARG003
        """Add to `inputs` what stays the same from step to step; `parts` has one for each image, some not None."""
        return inputs

    @classmethod
    def at_each_step(cls, parts: Sequence[Self | None], rows: BatchRows) -> AtEachStep | None:  # noqa: ARG003
        """Return what must be computed anew at each step, if anything must."""
        return None


def spread(sides: Tensor, rows: int) -> Tensor:
    """Repeat `(1|2, …)`, for the prompt or for negative prompt and prompt, for each model row: `(rows, …)`."""
    if len(sides) == rows:
        return sides
    return torch.cat([sides[:1], sides[1:].expand(rows - 1, *sides.shape[1:])])


def stack_text(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack keys and values, `(b, T, K)` each, to `(rows, T, K)`, with a mask where the lengths differ.

    Padding between requests is masked, because unmasked it would change attention.
    """
    longest = max(kv.shape[1] for kv in texts)
    if all(kv.shape[1] == longest for kv in texts):
        return torch.cat(list(texts)), None
    lengths = torch.cat([torch.full((len(kv),), kv.shape[1]) for kv in texts])
    padded = [pad(kv, (0, 0, 0, longest - kv.shape[1])) for kv in texts]
    return torch.cat(padded), torch.arange(longest) < lengths[:, None]
