"""Images on their way from noise to latents, and the request that they belong to."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scumble.errors import ScumbleError
from scumble.events import Event, Failed, Step
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.phase import Phase
from scumble_server.denoise.schedulers import HISTORY, Table


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """The phases of one request, made of its texts and adapters; shared by its images."""

    phases: tuple[Phase, ...]
    phase_of_step: tuple[int, ...]
    adapters: frozenset[str]
    """Digests of the bound adapters: how the loop counts that different requests share a step."""
    prompt_weights: tuple[float, ...] = (1.0,)
    """The weight of each of an image's prompts, on top of the guidance."""


@dataclass(slots=True)
class ActiveRequest:
    """One request as the loop sees it. Written by the loop's thread alone, once its images are queued.

    Times are seconds of `time.monotonic`. `preview` is None, or makes previews of a request's estimates
    `(n, 4, H/8, W/8)`, sent every `preview_every` steps.
    """

    on_event: Callable[[Event], None]
    is_cancelled: Callable[[], bool]
    on_denoised: Callable[[ActiveRequest], None]
    images: list[Image] = field(default_factory=list)
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
    """Steps of an earlier pass."""
    steps_after: int = 0
    """Steps of a later pass."""
    not_finite: Callable[[int], ScumbleError] = lambda step: ScumbleError(f"NaN in step {step}")
    """Makes the error of a picture that became NaN or infinite in a step."""

    def report(self) -> None:
        """Send the slowest image's step, if it moved, and a preview, if one is due."""
        steps = self.images[0].table.steps
        step = min(image.step for image in self.images)
        if step > self.reported:
            due = self.preview_every and step // self.preview_every > self.reported // self.preview_every
            self.reported = step
            now, total = self.steps_before + step, self.steps_before + steps + self.steps_after
            self.on_event(Step(now, total))
            if due and self.preview is not None and step < steps:
                self.on_event(self.preview(now, total, torch.stack([image.estimate for image in self.images])))

    def fail(self, failed: Failed) -> None:
        """End the request, unless it has ended."""
        if not self.ended:
            self.ended = True
            self.on_event(failed)

    def join(self) -> None:
        """Note when its first image took its first step."""
        if self.joined_at is None:
            self.joined_at = time.monotonic()


@dataclass(frozen=True, slots=True, eq=False)
class MaskedOriginal:
    """The picture of which an image keeps a part: picture and noise `(4, H/8, W/8)`, mask `(1, H/8, W/8)`, 0 where it
    is kept.
    """

    picture: Tensor
    noise: Tensor
    mask: Tensor

    def restore(self, sample: Tensor, noised: Tensor) -> Tensor:
        """Put the kept part back into a sample. noised `(2,)`: how much of picture and noise there is at this step."""
        of_picture, of_noise = noised.tolist()
        original: Tensor = of_picture * self.picture + of_noise * self.noise
        return (1 - self.mask) * original + self.mask * sample


@dataclass(slots=True, eq=False)
class Image:
    """One image with its steps. `sample` `(4, H/8, W/8)` is float32 on the executor's device. So are `estimate`, what
    the last step took the finished image to be, and `history` `(HISTORY, 4, H/8, W/8)`, what its scheduler remembers.
    """

    request: ActiveRequest
    conditioning: Conditioning
    table: Table
    guidance: float
    sample: Tensor
    noise: Noise
    history: Tensor = field(init=False)
    estimate: Tensor = field(init=False)
    original: MaskedOriginal | None = None
    inpaint_channels: Tensor | None = None
    """What a UNet for inpainting reads beside the sample: mask and masked picture, `(5, H/8, W/8)`."""
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
        """Images of one group can share a step: the same weights, and latents of the same height and width."""
        return id(self.phase.executor), tuple(self.sample.shape[-2:])
