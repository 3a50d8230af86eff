"""Rows of strangers as one batch: what is stacked when the composition changes, and the step itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scumble_build.inputs import StepInputs
from scumble_server import stacking
from scumble_server.rows import Row


class Batch:
    """A fixed composition of rows of one group, each in one phase. Used by the loop's thread alone, while it fits.

    An image is one model row, or its negative prompt's and then one for each prompt that acts against it; they share
    its factors. Images with factors come first, because a graph computes factors for the first `m` model rows only.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = sorted(rows, key=stacking.by_set)
        self._phases = [row.phase for row in self.rows]
        self._executor = self._phases[0].executor
        device = self._executor.device
        counts = [phase.kv.shape[0] for phase in self._phases]
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
        self._image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        self._first = starts.to(device)
        strengths = [
            strength for row, count in zip(self.rows, counts, strict=True) for strength in _strengths(row, count)
        ]
        self._strength = torch.tensor(strengths, device=device).view(-1, 1, 1, 1)
        self._inputs = stacking.stack(self._phases, device)
        self._nets = stacking.stack_nets(self._phases, device)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Are these its rows, and is each still in the phase that was stacked?"""
        return {id(row) for row in rows} == {id(row) for row in self.rows} and all(
            row.phase is phase for row, phase in zip(self.rows, self._phases, strict=True)
        )

    def advance(self) -> None:
        """One step of every row: its own timestep, guidance, scheduler and adapters."""
        rows, device = self.rows, self._executor.device
        sample = torch.stack([row.sample for row in rows])
        history = torch.stack([row.history for row in rows])
        timestep = torch.stack([row.table.timestep[row.step] for row in rows]).to(device)[self._image]
        c_in, a, b, c, p, q, u, v = (
            torch.stack([getattr(row.table, name)[row.step] for row in rows]).to(device).view(-1, 1, 1, 1)
            for name in ("c_in", "a", "b", "c", "p", "q", "u", "v")
        )
        scaled = (sample * c_in)[self._image]
        output = self._executor.denoise(scaled, timestep, self._with_residuals(scaled, timestep))
        # The first row of an image differs from itself by nothing, and so adds nothing.
        first = output[self._first]
        m = first.index_add(0, self._image, self._strength * (output - first[self._image]))
        following = a * sample + b * m + c * history
        history = p * sample + q * m
        estimate = u * sample + v * m
        for i, row in enumerate(rows):
            row.sample, row.history, row.estimate = following[i], history[i], estimate[i]
            row.step += 1

    def _with_residuals(self, sample: Tensor, timestep: Tensor) -> StepInputs:
        """What is stacked, with what the ControlNets say of this step; each net runs once for all its rows."""
        return stacking.with_residuals(self._inputs, self._nets, sample, timestep)

    def mixed(self) -> bool:
        """Do rows with different adapters share this batch?"""
        return len({row.conditioning.adapters for row in self.rows}) > 1

    @property
    def model_rows(self) -> int:
        return self._inputs.kv.shape[0]


def _strengths(row: Row, count: int) -> list[float]:
    """How strongly the difference of each model row of an image to its first one counts (Ho and Salimans, 2207.12598;
    Liu et al., 2206.01714).
    """
    return [0.0] if count == 1 else [0.0, *(row.guidance * weight for weight in row.conditioning.prompt_weights)]
