"""Pictures are prepared and encoded as transformers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from scumble_build.graphs.vision import ImageEncoder

SIDE = 32


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(folder := tmp_path_factory.mktemp("tower"))
    return folder, model


def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, shape, np.uint8) for shape in ((40, 50, 3), (33, 70, 4))]


def test_pictures_of_any_size_are_encoded_as_transformers_encodes_them(tower: tuple[Path, Any]) -> None:
    folder, model = tower
    encoder = ImageEncoder(folder, None, "cpu", torch.float32)
    images = [Image.fromarray(pixels[..., :3]) for pixels in pictures()]  # diffusers leaves alpha out
    prepared = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = model(prepared, output_hidden_states=True)
    found = encoder.encode(pictures())
    torch.testing.assert_close(found.embedding, expected.image_embeds)
    torch.testing.assert_close(found.states, expected.hidden_states[-2])


def test_nothing_is_zeros_behind_the_preparation(tower: tuple[Path, Any]) -> None:
    folder, model = tower
    with torch.inference_mode():
        expected = model(torch.zeros(1, 3, SIDE, SIDE), output_hidden_states=True)
    found = ImageEncoder(folder, None, "cpu", torch.float32).encode_nothing()
    torch.testing.assert_close(found.states, expected.hidden_states[-2])


def test_a_preparation_of_its_own_is_followed(tower: tuple[Path, Any], tmp_path: Path) -> None:
    own = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    own.save_pretrained(tmp_path)
    encoder = ImageEncoder(tower[0], tmp_path, "cpu", torch.float32)
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    assert torch.equal(encoder.prepare([white]), torch.ones(1, 3, SIDE, SIDE))
