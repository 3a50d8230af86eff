"""A row: one image on its way from noise to latents, with all that it alone carries."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scumble.events import Event, Failed, Step
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.phase import Phase
from scumble_server.denoise.schedulers import HISTORY, Table


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the text and the adapters of one request become: shared by its images."""

    phases: tuple[Phase, ...]
    phase_of_step: tuple[int, ...]
    adapters: frozenset[str]
    """Digests of the bound adapters: how the loop counts that strangers share a step."""
    prompt_weights: tuple[float, ...] = (1.0,)
    """How strongly each of an image's prompts acts, on top of the guidance."""


@dataclass(slots=True)
class Progress:
    """One request as the loop sees it. Written by the loop's thread alone, once its rows are queued.

    Times are seconds of `time.monotonic`. `preview` is None, or what makes previews of a request's estimates
    `(n, 4, H/8, W/8)`, told every `preview_every` steps.
    """

    on_event: Callable[[Event], None]
    is_cancelled: Callable[[], bool]
    on_denoised: Callable[[Progress], None]
    rows: list[Row] = field(default_factory=list)
    priority: int = 0
    deadline: float | None = None
    preview: Callable[[int, int, Tensor], Event] | None = None
    preview_every: int = 0
    queued_at: float = field(default_factory=time.monotonic)
    joined_at: float | None = None
    finished_at: float = 0.0
    ended: bool = False
    reported: int = 0
    steps_before: int = 0
    """Of an earlier pass."""
    steps_after: int = 0
    """Of a later one."""

    def report(self) -> None:
        """Tell the slowest image's step, if it moved, and a preview, if one is due."""
        steps = self.rows[0].table.steps
        step = min(row.step for row in self.rows)
        if step > self.reported:
            due = self.preview_every and step // self.preview_every > self.reported // self.preview_every
            self.reported = step
            now, total = self.steps_before + step, self.steps_before + steps + self.steps_after
            self.on_event(Step(now, total))
            if due and self.preview is not None and step < steps:
                self.on_event(self.preview(now, total, torch.stack([row.estimate for row in self.rows])))

    def fail(self, failed: Failed) -> None:
        if not self.ended:
            self.ended = True
            self.on_event(failed)

    def join(self) -> None:
        if self.joined_at is None:
            self.joined_at = time.monotonic()


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What an image keeps of a picture: picture and noise `(4, H/8, W/8)`, mask `(1, H/8, W/8)`, 0 where it is kept."""

    picture: Tensor
    noise: Tensor
    mask: Tensor

    def put_back(self, sample: Tensor, noised: Tensor) -> Tensor:
        """`noised` (2,) says how noisy the kept part must be."""
        of_picture, of_noise = noised.tolist()
        kept: Tensor = of_picture * self.picture + of_noise * self.noise
        return (1 - self.mask) * kept + self.mask * sample


@dataclass(slots=True, eq=False)
class Row:
    """One image. `sample` `(4, H/8, W/8)` is float32 on the executor's device. So are `estimate`, what the last step
    took the finished image to be, and `history` `(HISTORY, 4, H/8, W/8)`, what its scheduler remembers.
    """

    progress: Progress
    conditioning: Conditioning
    table: Table
    guidance: float
    sample: Tensor
    noise: Noise
    history: Tensor = field(init=False)
    estimate: Tensor = field(init=False)
    kept: Kept | None = None
    shown: Tensor | None = None
    """Of a base that fills masked parts: mask and masked picture, `(5, H/8, W/8)`, which the UNet looks at too."""
    rescale: float = 0.0
    """How much of the guided prediction's contrast is set back to the prompt's own (Lin et al., 2305.08891, 3.4)."""
    step: int = 0

    def __post_init__(self) -> None:
        self.history = self.sample.new_zeros((HISTORY, *self.sample.shape))
        self.estimate = torch.zeros_like(self.sample)

    @property
    def done(self) -> bool:
        return self.step == self.table.steps

    @property
    def phase(self) -> Phase:
        return self.conditioning.phases[self.conditioning.phase_of_step[self.step]]

    @property
    def group(self) -> Hashable:
        """Rows of one group can share a step: the same weights, and latents of the same height and width."""
        return id(self.phase.executor), tuple(self.sample.shape[-2:])
