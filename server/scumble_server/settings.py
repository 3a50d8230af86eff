"""What a request asks for, once its gaps are filled with the base's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from scumble.request import SchedulerName, TimestepSpacing


@dataclass(frozen=True, slots=True)
class Settings:
    """A request whose every field has a value; of the scheduler's options, None is what the base's config says."""

    prompt: str
    negative_prompt: str
    scheduler: SchedulerName
    seed: int
    steps: int
    width: int
    height: int
    num_images: int
    guidance_scale: float
    timestep_spacing: TimestepSpacing | None
    rescale_betas: bool | None
    eta: float | None

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def seeds(self) -> list[int]:
        """Image i of n uses seed + i."""
        return [self.seed + i for i in range(self.num_images)]
