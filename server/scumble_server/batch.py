"""Rows of strangers as one batch: what is stacked when the composition changes, and the step itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.adapted import Factors
from scumble_server.executors import Executor
from scumble_server.methods.lora import RowFactors
from scumble_server.rows import Row


class Batch:
    """A fixed composition of rows, each in one phase. Used by the loop's thread alone, until it is stale.

    A guided image is two model rows (negative prompt, then prompt) that share its factors. Images with factors
    come first, because a graph computes factors for the first `m` model rows only.
    """

    def __init__(self, rows: Sequence[Row], executor: Executor) -> None:
        self.rows = sorted(rows, key=_by_set)
        self._phases = [row.phase for row in self.rows]
        self._executor = executor
        device = executor.device
        self._kv = torch.cat([row.phase.kv for row in self.rows])
        counts = torch.tensor([row.phase.kv.shape[0] for row in self.rows])
        ends = counts.cumsum(0)
        self._image = torch.repeat_interleave(torch.arange(len(self.rows)), counts).to(device)
        self._prompt = (ends - 1).to(device)
        self._negative = (ends - counts).to(device)
        guided = [row.guidance if row.phase.kv.shape[0] == 2 else 1.0 for row in self.rows]
        self._guidance = torch.tensor(guided, device=device).view(-1, 1, 1, 1)
        self._factors = _stack([row.phase.factors for row in self.rows], counts.tolist(), device)

    def advance(self) -> None:
        """One step of every row: its own timestep, guidance, scheduler and adapters."""
        rows, device = self.rows, self._executor.device
        sample = torch.stack([row.sample for row in rows])
        history = torch.stack([row.history for row in rows])
        timestep = torch.stack([row.table.timestep[row.step] for row in rows]).to(device)
        c_in, a, b, c, p, q = (
            torch.stack([getattr(row.table, name)[row.step] for row in rows]).to(device).view(-1, 1, 1, 1)
            for name in ("c_in", "a", "b", "c", "p", "q")
        )
        output = self._executor.denoise((sample * c_in)[self._image], timestep[self._image], self._kv, self._factors)
        negative = output[self._negative]
        m = negative + self._guidance * (output[self._prompt] - negative)
        following = a * sample + b * m + c * history
        history = p * sample + q * m
        for i, row in enumerate(rows):
            row.sample, row.history = following[i], history[i]
            row.step += 1

    def is_stale(self) -> bool:
        """Has a row, which is not done, come into another phase?"""
        return any(row.phase is not phase for row, phase in zip(self.rows, self._phases, strict=True))

    def mixed(self) -> bool:
        """Do rows with different adapters share this batch?"""
        return len({row.conditioning.adapters for row in self.rows}) > 1

    @property
    def model_rows(self) -> int:
        return self._kv.shape[0]


def _by_set(row: Row) -> tuple[bool, int]:
    """Rows with factors first, equal bound sets side by side."""
    factors = row.phase.factors
    return factors is None, id(factors.bound) if factors is not None else 0


def _stack(carried: Sequence[RowFactors | None], counts: Sequence[int], device: str) -> Factors | None:
    """One slot per distinct bound set, in the order of the rows; `carried` has equal sets side by side.

    A smaller slot is padded with zeros to the batch's rank (columns) and layout (rows, behind the small layout).
    """
    present = [(factors, count) for factors, count in zip(carried, counts, strict=True) if factors is not None]
    if not present:
        return None
    bound = {id(factors.bound): factors.bound for factors, _ in present}
    slots = {key: slot for slot, key in enumerate(bound)}
    rank = max(each.rank for each in bound.values())
    scale = torch.cat([_pad(factors.scale, 0, rank).expand(count, -1) for factors, count in present])
    slot = torch.cat([torch.full((count,), slots[id(factors.bound)]) for factors, count in present])
    rows_of_slot = slot.bincount()
    return Factors(
        _stack_padded([each.A for each in bound.values()], rank).to(device),
        _stack_padded([each.B for each in bound.values()], rank).to(device),
        slot.to(device),
        scale.to(device),
        rows_per_slot=int(rows_of_slot[0]) if (rows_of_slot == rows_of_slot[0]).all() else 0,
    )


def _stack_padded(tensors: Sequence[Tensor], rank: int) -> Tensor:
    height = max(len(tensor) for tensor in tensors)
    return torch.stack([_pad(tensor, height - len(tensor), rank) for tensor in tensors])


def _pad(tensor: Tensor, rows: int, rank: int) -> Tensor:
    return pad(tensor, (0, rank - tensor.shape[-1], *((0, rows) if rows else ())))


def factors_of(carried: RowFactors | None, rows: int, device: str) -> Factors | None:
    """One request's factors for all `rows` of a call of its own, as while encoding its prompts."""
    return _stack([carried], [rows], device)
