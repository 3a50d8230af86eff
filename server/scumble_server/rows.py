"""A row: one image on its way from noise to latents, with all that it alone carries."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scumble.events import Event, Failed, Step
from scumble_server.methods.lora import RowFactors
from scumble_server.schedulers import Table


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """A stretch of a schedule in which the same adapters act.

    kv `(1, T, K)` of the prompt, or `(2, T, K)` of negative prompt and prompt where the request is guided.
    """

    kv: Tensor
    factors: RowFactors | None


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the text and the adapters of one request become: shared by its images."""

    phases: tuple[Phase, ...]
    phase_of_step: tuple[int, ...]
    adapters: frozenset[str]
    """Digests of the bound adapters: how the loop counts that strangers share a step."""


@dataclass(slots=True)
class Progress:
    """One request as the loop sees it. Written by the loop's thread alone, once its rows are queued."""

    on_event: Callable[[Event], None]
    is_cancelled: Callable[[], bool]
    on_denoised: Callable[[Progress], None]
    rows: list[Row] = field(default_factory=list)
    joined_at: float | None = None
    finished_at: float = 0.0
    ended: bool = False
    reported: int = 0

    def report(self) -> None:
        """Tell the slowest image's step, if it moved."""
        steps = self.rows[0].table.steps
        step = min(row.step for row in self.rows)
        if step > self.reported:
            self.reported = step
            self.on_event(Step(step, steps))

    def fail(self, failed: Failed) -> None:
        if not self.ended:
            self.ended = True
            self.on_event(failed)

    def join(self) -> None:
        if self.joined_at is None:
            self.joined_at = time.monotonic()


@dataclass(slots=True, eq=False)
class Row:
    """One image. `sample` and `history` are `(4, H/8, W/8)` float32 on the executor's device."""

    progress: Progress
    conditioning: Conditioning
    table: Table
    guidance: float
    sample: Tensor
    history: Tensor
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step == self.table.steps

    @property
    def phase(self) -> Phase:
        return self.conditioning.phases[self.conditioning.phase_of_step[self.step]]

    @property
    def size(self) -> tuple[int, int]:
        """(H/8, W/8): only rows of one size share a step."""
        return self.sample.shape[-2], self.sample.shape[-1]


def initial_noise(seed: int, height: int, width: int) -> Tensor:
    """`(4, height, width)`: what diffusers draws for one image with a CPU generator of this seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, 4, height, width), generator=generator)[0]
