"""Samples: the base's scheduler, fixed seeds, and prompts of any length that is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from scumble_trainers.results.sampling import Samples, draw_samples


def drawn(folder: Path, *prompts: str) -> NDArray[np.uint8]:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    samples = Samples(prompts, seed=1, steps=2, guidance=5.0, resolution=64)
    return np.stack([np.asarray(picture) for picture in draw_samples(pipeline, samples)])


def test_the_end_of_a_long_prompt_is_seen(family_folder: Path) -> None:
    long = "a very long " * 20
    one, other = drawn(family_folder, long + "red", "short"), drawn(family_folder, long + "blue", "short")
    assert np.abs(one[0].astype(int) - other[0]).max() > 0
    assert np.abs(one[1].astype(int) - other[1]).max() == 0


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_is_what_the_base_makes_of_it(sdxl_folder: Path, zeros: bool) -> None:
    """Of short prompts, embeddings that are made here draw what the pipeline draws of their texts."""
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    samples = Samples(("a red disc",), seed=1, steps=2, guidance=5.0, resolution=64)
    (of_text,) = draw_samples(pipeline, samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scumble_trainers.results.sampling._fits", lambda _: False)
        (of_embeddings,) = draw_samples(pipeline, samples)
    np.testing.assert_allclose(np.asarray(of_embeddings, int), np.asarray(of_text, int), atol=1)
