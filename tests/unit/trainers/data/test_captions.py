"""Captions are embedded as diffusers' own pipelines embed prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from scumble_trainers.data import captions as module
from scumble_trainers.data.captions import TextEncoders, read_captions
from scumble_trainers.data.dataset import Example

TEXTS = (("a red apple", "one more red apple"), ("", "a red apple"), ("a very long " * 40,))


def examples() -> list[Example]:
    return [Example(str(index), Path(), texts, "", (8, 8)) for index, texts in enumerate(TEXTS)]


def embedded_by_diffusers(pipeline: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not hasattr(pipeline, "text_encoder_2"):
        return pipeline.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)[0], None
    states, _, pooled, _ = pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
    return states, pooled


@torch.no_grad()
@pytest.mark.parametrize("cache", [True, False])
def test_states_and_pooled_are_diffusers_own(family_folder: Path, cache: bool) -> None:
    pipeline = DiffusionPipeline.from_pretrained(family_folder, local_files_only=True)
    encoders = TextEncoders(pipeline)
    captions = read_captions(encoders, examples(), cache=cache, device=torch.device("cpu"))
    assert (captions.embeddings is not None) == cache

    text = captions.embed(encoders, captions.of(torch.tensor([0, 1, 2])), torch.device("cpu"))
    states, pooled = embedded_by_diffusers(pipeline, [texts[0] for texts in TEXTS])
    torch.testing.assert_close(text.states, states)
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(text.pooled, pooled)
    assert encoders.width == states.shape[-1]


@torch.no_grad()
def test_sd_1s_too(base_folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(base_folder, local_files_only=True)
    encoders = TextEncoders(pipeline)
    text = encoders(encoders.tokenize(["a red apple"]))
    torch.testing.assert_close(text.states, embedded_by_diffusers(pipeline, ["a red apple"])[0])


def test_a_picture_shows_any_of_its_captions_or_none(base_folder: Path) -> None:
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(base_folder, local_files_only=True))
    captions = read_captions(encoders, examples(), cache=False, device=torch.device("cpu"))
    assert len(captions.tokens) == 4, "one caption occurs twice and is kept once"
    pictures, kept = torch.tensor([0, 0, 1, 1, 2]), torch.zeros(5, dtype=torch.bool)
    which = torch.tensor([0.0, 0.99, 0.2, 0.6, 0.99])
    assert captions.choose(pictures, which, kept).tolist() == [1, 2, 0, 1, 3]
    assert captions.choose(pictures, which, ~kept).tolist() == [0] * 5


def test_embeddings_that_would_not_fit_are_made_at_every_step(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_LIMIT", 1000)
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(base_folder, local_files_only=True))
    assert read_captions(encoders, examples(), cache=True, device=torch.device("cpu")).embeddings is None
