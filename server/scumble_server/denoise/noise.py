"""The noise of one image: what diffusers draws with `torch.Generator("cpu").manual_seed(seed)`, in its order."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Noise:
    """Owns the image's generator. `draw` is the initial noise; then come, in their order, the steps that ask for some.

    All are `(4, height, width)` float32 on the CPU. Any thread may call it.
    """

    def __init__(self, seed: int, height: int, width: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._shape = (1, 4, height, width)
        self._step, self._drawn = -1, torch.empty(0)
        self._lock = threading.Lock()

    def draw(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator)[0]

    def of_step(self, step: int) -> Tensor:
        """Fresh for every step; the same again where a step that failed is tried again."""
        with self._lock:
            if step != self._step:
                self._step, self._drawn = step, self.draw()
            return self._drawn
