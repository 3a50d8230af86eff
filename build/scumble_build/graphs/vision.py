"""CLIP's vision tower, whose output IP-Adapters read (Radford et al., 2103.00020; transformers' own layers)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble_build.graphs.loading import load_whole

PREPARATION = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class EncodedPictures:
    """n encoded pictures: embedding (n, E) is the tower's projected output, states (n, N, C) its last layer but one."""

    embedding: Tensor
    states: Tensor


class ImageEncoder:
    """Owns one vision tower, which is never changed. Any thread may call it."""

    def __init__(self, folder: Path, preparation: Path | None, device: str, dtype: torch.dtype) -> None:
        """Load the tower from `folder`, as CLIPVisionModelWithProjection saves it.

        `preparation` is a folder with preprocessor_config.json; None prepares pictures as CLIP does, at the tower's
        size. Raises Refused if the tower is not whole.
        """
        model: Any = load_whole(CLIPVisionModelWithProjection, folder, torch.float32)
        size: int = model.config.image_size
        # Not CLIPImageProcessor: with torchvision installed that is another class, which resizes slightly differently.
        self._preparation: Any = (
            CLIPImageProcessorPil.from_pretrained(preparation, local_files_only=True)
            if preparation is not None
            else CLIPImageProcessorPil(size=size, crop_size=size)
        )
        self._device, self._dtype = device, dtype
        self._model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._size = size

    def prepare(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Resize and normalise pictures (H, W, 3 or 4) of any sizes: (n, 3, S, S) float32. Alpha is dropped, as in
        diffusers.
        """
        images = [Image.fromarray(pixels).convert("RGB") for pixels in pictures]
        prepared: Tensor = self._preparation(images, return_tensors="pt").pixel_values
        return prepared

    def encode(self, pictures: Sequence[NDArray[np.uint8]]) -> EncodedPictures:
        return self._run(self.prepare(pictures))

    def encode_nothing(self) -> EncodedPictures:
        """Encode zeros in place of a prepared picture: what `plus` IP-Adapters take for no picture."""
        return self._run(torch.zeros(1, 3, self._size, self._size))

    @torch.inference_mode()
    def _run(self, prepared: Tensor) -> EncodedPictures:
        output = self._model(prepared.to(self._device, self._dtype), output_hidden_states=True)
        return EncodedPictures(output.image_embeds, output.hidden_states[-2])
