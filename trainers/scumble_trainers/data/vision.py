"""What the vision tower makes of a run's pictures: once where that fits memory, else at every step."""

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
from scumble_trainers.steps.progress import ProgressReport

Reads = Literal["embedding", "states"]
"""The tower's projected output (n, E), or the states of its last layer but one (n, N, C)."""

CACHE_LIMIT = 2 * 2**30
"""Bytes of what it makes that are kept in memory."""
_AT_ONCE = 32


def encoder_folder(base: TrainingBase, given: Path | None) -> Path:
    """`given`, or the base's own; Incompatible where there is none."""
    folder = given or base.folder / "image_encoder"
    if not (folder / "config.json").is_file():
        raise Incompatible(
            f"{folder} is no image encoder (CLIPVisionModelWithProjection); name one with --image-encoder FOLDER",
            field="image_encoder",
        )
    return folder


class PictureStates:
    """Owns a frozen vision tower. `seen[i]` is what it makes of example i."""

    def __init__(self, base: TrainingBase, given: Path | None, reads: Reads, device: torch.device) -> None:
        folder = encoder_folder(base, given)
        places = [folder] if given else [folder, base.folder / "feature_extractor"]
        preparation = next((place for place in places if (place / PREPARATION).is_file()), None)
        self._encoder = ImageEncoder(folder, preparation, str(device), torch.float32)
        self._reads: Reads = reads
        self._device = device
        self._examples: Sequence[Example] = ()
        self._kept: Tensor | None = None

    def read(self, examples: Sequence[Example], report: ProgressReport) -> None:
        """Looks at all examples now, if what it makes of them can be kept."""
        self._examples = examples
        if len(examples) * self.nothing().numel() * 4 > CACHE_LIMIT:
            return
        parts = []
        for start in range(0, len(examples), _AT_ONCE):
            parts.append(self._encode(examples[start : start + _AT_ONCE]).cpu())
            report("pictures seen", min(start + _AT_ONCE, len(examples)), len(examples))
        self._kept = torch.cat(parts)

    def of(self, pictures: Tensor) -> Tensor:
        """`(B, …)` on the device: of the examples with these numbers."""
        if self._kept is not None:
            return self._kept[pictures].to(self._device)
        return self._encode([self._examples[picture] for picture in pictures.tolist()])

    def nothing(self) -> Tensor:
        """`(1, …)`: what stands for no picture; zeros for an embedding, a blank picture's states for states."""
        blank = self._encoder.encode_nothing()
        return (torch.zeros_like(blank.embedding) if self._reads == "embedding" else blank.states).clone()

    def _encode(self, examples: Sequence[Example]) -> Tensor:
        return self.look([np.asarray(load_picture(example.path, example.size)) for example in examples])

    def look(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """`(B, …)` of pictures (H, W, 3) that are no examples."""
        encoded = self._encoder.encode(pictures)
        # Made in inference mode: a clone may take part in what gradients are made of.
        return (encoded.embedding if self._reads == "embedding" else encoded.states).clone()
