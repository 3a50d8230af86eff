"""Draws sample grids of known concepts with fixed seeds by diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from scumble_demo.emoji.captions import canonical_caption
from scumble_demo.emoji.concepts import BASE_STYLES, base_concepts
from scumble_demo.emoji.render import contact_sheet

STEPS, GUIDANCE = 25, 3.0


def grid_prompts(count: int = 36) -> list[str]:
    """Return prompts of concepts spread evenly over the list, in the styles in turn."""
    known = base_concepts()
    return [
        canonical_caption(known[number * len(known) // count], BASE_STYLES[number % len(BASE_STYLES)])
        for number in range(count)
    ]


class Drawing:
    """Draw the grid with the pipeline's current weights."""

    def __init__(self, pipe: Any, count: int = 36) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.prompts = pipe, grid_prompts(count)

    def __call__(self, path: Path) -> None:
        made = self.pipe(
            self.prompts,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(len(self.prompts))],
            output_type="np",
        ).images
        contact_sheet((made * 255).round().astype(np.uint8), columns=6).save(path)
