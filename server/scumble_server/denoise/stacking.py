"""Stacks what the images of a batch carry into the inputs of one step, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble_build.graphs.inputs import StepInputs
from scumble_server.denoise.phase import Phase
from scumble_server.methods.part import AtEachStep, BatchRows, Part, stack_text


@dataclass(frozen=True, slots=True)
class Stacked:
    """The inputs that stay the same from step to step, and what is added to them at each step."""

    inputs: StepInputs
    each_step: tuple[AtEachStep, ...]

    def at(self, sample: Tensor, timestep: Tensor) -> StepInputs:
        """The inputs of one step: sample `(rows, 4, h, w)` and timestep `(rows,)` are what the denoiser gets."""
        inputs = self.inputs
        for add in self.each_step:
            inputs = add(inputs, sample, timestep)
        return inputs


def stack(phases: Sequence[Phase], device: str) -> Stacked:
    """Stack the phases of a batch's images, in their order; images with factors come first, equal sets side by side."""
    rows = BatchRows(tuple(phase.rows for phase in phases), device)
    kv, mask = stack_text([phase.kv for phase in phases])
    inputs = StepInputs(
        kv.to(device),
        mask.to(device) if mask is not None else None,
        pooled=_stack_pooled([phase.pooled for phase in phases], device),
        sizes=_stack_sizes([phase.sizes for phase in phases], rows),
    )
    each_step = []
    for parts in _by_kind(phases):
        kind = next(type(part) for part in parts if part is not None)
        inputs = kind.stack(parts, rows, inputs)
        if (add := kind.at_each_step(parts, rows)) is not None:
            each_step.append(add)
    return Stacked(inputs, tuple(each_step))


def _by_kind(phases: Sequence[Phase]) -> list[list[Part | None]]:
    """For each kind of part that an image has: one for each image, or None."""
    kinds = dict.fromkeys(kind for phase in phases for kind in phase.parts)
    parts: list[list[Part | None]] = [[phase.parts.get(kind) for phase in phases] for kind in kinds]
    if any(phase.factors is not None for phase in phases):
        parts.insert(0, [phase.factors for phase in phases])
    return parts


def _stack_pooled(pooled: Sequence[Tensor | None], device: str) -> Tensor | None:
    """`(rows, E)`, or None: all rows of a batch are of one base."""
    present = [text for text in pooled if text is not None]
    return torch.cat(present).to(device) if present else None


def _stack_sizes(sizes: Sequence[tuple[int, ...] | None], rows: BatchRows) -> Tensor | None:
    """`(rows, 6)`, or None."""
    repeated = [size for size, count in zip(sizes, rows.counts, strict=True) if size is not None for _ in range(count)]
    return torch.tensor(repeated, dtype=torch.float32, device=rows.device) if repeated else None
