"""The vision tower's output for a run's pictures: computed once if it fits in memory, else at every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scumble.errors import Incompatible
from scumble_build.graphs.vision import PREPARATION, ImageEncoder
from scumble_trainers.base import TrainingBase
from scumble_trainers.data.dataset import Example, load_picture
from scumble_trainers.progress import ProgressReport

Reads = Literal["embedding", "states"]
"""The tower's projected output (n, E), or the states of its last layer but one (n, N, C)."""

CACHE_LIMIT = 2 * 2**30
"""Largest size in bytes of outputs kept in memory."""
_AT_ONCE = 32


def encoder_folder(base: TrainingBase, given: Path | None) -> Path:
    """Return `given`, or the base's own image encoder. Raises Incompatible if there is none."""
    folder = given or base.folder / "image_encoder"
    if not (folder / "config.json").is_file():
        raise Incompatible(
            f"{folder} is no image encoder (CLIPVisionModelWithProjection); pass one with --image-encoder FOLDER",
            field="image_encoder",
        )
    return folder


class PictureStates:
    """Owns a frozen vision tower. `seen[i]` is its output for example i."""

    def __init__(self, base: TrainingBase, given: Path | None, reads: Reads, device: torch.device) -> None:
        folder = encoder_folder(base, given)
        places = [folder] if given else [folder, base.folder / "feature_extractor"]
        preparation = next((path for path in places if (path / PREPARATION).is_file()), None)
        self._encoder = ImageEncoder(folder, preparation, str(device), torch.float32)
        self._reads: Reads = reads
        self._device = device
        self._examples: Sequence[Example] = ()
        self._kept: Tensor | None = None

    def read(self, examples: Sequence[Example], report: ProgressReport) -> None:
        """Encode all examples now, if the outputs fit in memory."""
        self._examples = examples
        if len(examples) * self.nothing().numel() * 4 > CACHE_LIMIT:
            return
        parts = []
        for start in range(0, len(examples), _AT_ONCE):
            parts.append(self._encode(examples[start : start + _AT_ONCE]).cpu())
            report("pictures seen", min(start + _AT_ONCE, len(examples)), len(examples))
        self._kept = torch.cat(parts)

    def of(self, pictures: Tensor) -> Tensor:
        """Return the outputs `(B, …)` of the examples with these indices, on the device."""
        if self._kept is not None:
            return self._kept[pictures].to(self._device)
        return self._encode([self._examples[picture] for picture in pictures.tolist()])

    def nothing(self) -> Tensor:
        """Return the output `(1, …)` that means no picture: a zero embedding, or a blank picture's states."""
        blank = self._encoder.encode_nothing()
        return (torch.zeros_like(blank.embedding) if self._reads == "embedding" else blank.states).clone()

    def _encode(self, examples: Sequence[Example]) -> Tensor:
        return self.look([np.asarray(load_picture(example.path, example.size)) for example in examples])

    def look(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Encode pictures (H, W, 3) that are not examples to `(B, …)`."""
        encoded = self._encoder.encode(pictures)
        # Cloned, because tensors made in inference mode cannot take part in autograd.
        return (encoded.embedding if self._reads == "embedding" else encoded.states).clone()
