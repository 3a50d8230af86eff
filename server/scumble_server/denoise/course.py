"""What a batch's next steps need from the host, brought to the device before they come."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from scumble_server.denoise.image import Image
from scumble_server.executors.cuda import pinned

_drawing = ThreadPoolExecutor(1, "noise")
"""Draws the noise of the next step while this one is computed."""


@dataclass(frozen=True, slots=True)
class Course:
    """The tables of a batch's images from where each is, up to the first one's end, on the device.

    timestep `(steps, images)`, c_in `(steps, images, 1, 1, 1)`, matrix `(steps, images, 2 + HISTORY, 3 + HISTORY)`: see
    `schedulers.Table`.
    """

    timestep: Tensor
    c_in: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, images: Sequence[Image], device: str) -> Self:
        steps = min(image.table.steps - image.step for image in images)
        left = [(image.table, slice(image.step, image.step + steps)) for image in images]
        return cls(
            torch.stack([table.timestep[part] for table, part in left], 1).to(device),
            torch.stack([table.c_in[part] for table, part in left], 1).view(steps, -1, 1, 1, 1).to(device),
            torch.stack([table.matrix[part] for table, part in left], 1).to(device),
        )


class NoiseAhead:
    """The noise of a batch's steps, `(images, 4, h, w)` on the device: drawn on the host, in a thread of its own."""

    def __init__(self, images: Sequence[Image], device: str) -> None:
        self._images, self._device = images, device
        self._none = torch.zeros(len(images), *images[0].sample.shape, device=device)
        self._ahead: Future[Tensor | None] | None = None
        self._ahead_for: list[int] = []

    def of_this_step(self) -> Tensor:
        """Zeros for images whose scheduler draws none in this step."""
        if self._ahead is None or self._ahead_for != self._steps():  # others may have taken the step that was next
            self._begin()
        assert self._ahead is not None
        drawn = self._ahead.result()
        return self._none if drawn is None else drawn.to(self._device, non_blocking=True)

    def draw_ahead(self) -> None:
        """Begin with the next step's. To be called after a step that went well: one that failed is tried again."""
        if not any(image.done for image in self._images):
            self._begin()

    def _begin(self) -> None:
        self._ahead_for, self._ahead = self._steps(), _drawing.submit(self._draw)

    def _steps(self) -> list[int]:
        return [image.step for image in self._images]

    def _draw(self) -> Tensor | None:
        if not any(image.table.draws[image.step] for image in self._images):
            return None
        drawn = [
            image.noise.of_step(image.step) if image.table.draws[image.step] else torch.zeros(image.sample.shape)
            for image in self._images
        ]
        return pinned(torch.stack(drawn), self._device)
