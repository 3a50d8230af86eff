"""What a request asks for, once its gaps are filled with the base's defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """A request whose every field has a value."""

    prompt: str
    negative_prompt: str
    scheduler: str
    seed: int
    steps: int
    width: int
    height: int
    num_images: int
    guidance_scale: float

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def guidance(self) -> float:
        """How strongly prompts act against the negative prompt: 1 is no guidance."""
        return self.guidance_scale if self.guided else 1.0

    @property
    def seeds(self) -> list[int]:
        """Image i of n uses seed + i."""
        return [self.seed + i for i in range(self.num_images)]
