"""A request's settings, with its gaps filled by its adapters' and its base's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scumble.request import SchedulerName


@dataclass(frozen=True, slots=True)
class Settings:
    """A request whose every field has a value."""

    prompt: str
    negative_prompt: str | None
    """None where all zeros stand for it (SDXL's own rule)."""
    scheduler: SchedulerName
    seed: int
    steps: int
    width: int
    height: int
    num_images: int
    guidance_scale: float
    scheduler_options: Mapping[str, Any]
    """timestep_spacing, rescale_betas and eta, as far as they differ from the base's config."""
    prompt_2: str | None = None
    """For the second text encoder, where there is one; None or empty: the first's."""
    negative_prompt_2: str | None = None
    strength: float = 1.0
    first_step: int = 0
    """The step at which the schedule begins: later than 0 for img2img of a strength below 1."""
    sizes: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    """Height and width of the original, top and left of the crop, height and width aimed at, in pixels (SDXL)."""

    @property
    def run_steps(self) -> int:
        return self.steps - self.first_step

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def guidance(self) -> float:
        """The guidance scale; 1 is no guidance."""
        return self.guidance_scale if self.guided else 1.0

    @property
    def seeds(self) -> list[int]:
        """Image i of n uses seed + i."""
        return [self.seed + i for i in range(self.num_images)]
