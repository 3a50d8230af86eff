"""Rows of strangers as one batch: what is stacked when the composition changes, and the step itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scumble_build.graphs.inputs import StepInputs
from scumble_server.denoise import stacking
from scumble_server.denoise.image import Row
from scumble_server.denoise.stacking import NetCall


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
        weights = [each for row, count in zip(self.rows, counts, strict=True) for each in _weights(row, count)]
        self._weight = torch.tensor(weights, device=device).view(-1, 1, 1, 1)
        guidance = [row.guidance for row, count in zip(self.rows, counts, strict=True) for _ in range(count)]
        self._guidance = torch.tensor(guidance, device=device).view(-1, 1, 1, 1)
        self._stacked: tuple[StepInputs, list[NetCall]] | None = None
        """Made by the first step, so that what fails there fails as a step does."""

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
        c_in = torch.stack([row.table.c_in[row.step] for row in rows]).to(device).view(-1, 1, 1, 1)
        matrix = torch.stack([row.table.matrix[row.step] for row in rows]).to(device)
        scaled = (sample * c_in)[self._image]
        inputs = self._with_residuals(scaled, timestep)
        output = self._executor.denoise(self._with_shown(scaled), timestep, inputs)
        m = self._guide(output)
        state = torch.cat([sample[:, None], history, m[:, None], self._noise()[:, None]], 1)
        following = torch.einsum("roi,richw->rochw", matrix, state)
        for i, row in enumerate(rows):
            row.sample, row.history, row.estimate = following[i, 0], following[i, 1:-1], following[i, -1]
            row.step += 1
            if row.kept is not None:
                row.sample = row.kept.put_back(row.sample, row.table.noised[row.step])

    def _noise(self) -> Tensor:
        """`(rows, 4, h, w)`, drawn for the rows whose scheduler draws in this step, zero for the others."""
        drawn = [
            row.noise.of_step(row.step) if row.table.draws[row.step] else torch.zeros(row.sample.shape)
            for row in self.rows
        ]
        return torch.stack(drawn).to(self._executor.device)

    def _with_shown(self, scaled: Tensor) -> Tensor:
        """What a UNet that fills masked parts looks at. All rows of a batch are of one base, so all have it or none."""
        shown = [row.shown for row in self.rows if row.shown is not None]
        return torch.cat([scaled, torch.stack(shown)[self._image]], 1) if shown else scaled

    def _guide(self, output: Tensor) -> Tensor:
        """Predictions of the model rows `(rows, 4, h, w)` → of the images: the first row's, and what the others differ
        from it, as strongly as each one acts (Ho and Salimans, 2207.12598; Liu et al., 2206.01714).
        """
        first = output[self._first]
        difference = self._weight * (output - first[self._image])
        guided = first.index_add(0, self._image, self._guidance * difference)
        if not any(row.rescale for row in self.rows):
            return guided
        return self._rescale(guided, first.index_add(0, self._image, difference))

    def _rescale(self, guided: Tensor, prompt: Tensor) -> Tensor:
        """Both `(images, 4, h, w)`. An image that asks for none stays bit for bit what it is."""
        share = torch.tensor([row.rescale for row in self.rows], device=guided.device).view(-1, 1, 1, 1)
        dims = (1, 2, 3)
        rescaled = guided * (prompt.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return torch.where(share > 0, share * rescaled + (1 - share) * guided, guided)

    def _with_residuals(self, sample: Tensor, timestep: Tensor) -> StepInputs:
        """What is stacked, with what the ControlNets say of this step; each net runs once for all its rows."""
        if self._stacked is None:
            device = self._executor.device
            self._stacked = stacking.stack(self._phases, device), stacking.stack_nets(self._phases, device)
        return stacking.with_residuals(*self._stacked, sample, timestep)

    def mixed(self) -> bool:
        """Do rows with different adapters share this batch?"""
        return len({row.conditioning.adapters for row in self.rows}) > 1

    @property
    def model_rows(self) -> int:
        return len(self._image)


def _weights(row: Row, count: int) -> list[float]:
    """Of the model rows of an image; the first one's does not matter, for it does not differ from itself."""
    return [0.0] if count == 1 else [0.0, *row.conditioning.prompt_weights]
