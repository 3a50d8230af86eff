"""Captions are embedded as diffusers' own pipelines embed prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, SplitLongTextMode
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from scumble_build.chunks import MAX_CHUNKS
from scumble_server.prompts.tokens import tokenize as tokens_of_serving
from scumble_trainers.data import captions as module
from scumble_trainers.data.captions import TextEncoders, read_captions
from scumble_trainers.data.dataset import Example

TEXTS = (("a red apple", "one more red apple"), ("", "a red apple"), ("a very long " * 40,))
LONG = 5  # chunks of the last one: every letter is a token


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

    assert captions.chunks[captions.of(torch.tensor([0, 1, 2]))].tolist() == [1, 1, LONG]
    text = captions.embed(encoders, captions.of(torch.tensor([0, 1, 2])), torch.device("cpu"), LONG)
    states, pooled = embedded_by_diffusers(pipeline, [texts[0] for texts in TEXTS])
    torch.testing.assert_close(text.states[:, : states.shape[1]], states)  # of the long one, its first chunk
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(text.pooled, pooled)
    assert encoders.width == states.shape[-1]


@torch.no_grad()
def test_sd_1s_too(base_folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(base_folder, local_files_only=True)
    encoders = TextEncoders(pipeline)
    text = encoders(encoders.tokenize(["a red apple"]).ids)
    torch.testing.assert_close(text.states, embedded_by_diffusers(pipeline, ["a red apple"])[0])


def test_a_picture_shows_any_of_its_captions(base_folder: Path) -> None:
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(base_folder, local_files_only=True))
    captions = read_captions(encoders, examples(), cache=False, device=torch.device("cpu"))
    assert len(captions.tokens) == 4, "one caption occurs twice and is kept once"
    pictures, which = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0.0, 0.99, 0.2, 0.6, 0.99])
    assert captions.choose(pictures, which).tolist() == [1, 2, 0, 1, 3]


def test_embeddings_that_would_not_fit_are_made_at_every_step(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_LIMIT", 1000)
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(base_folder, local_files_only=True))
    assert read_captions(encoders, examples(), cache=True, device=torch.device("cpu")).embeddings is None


@torch.no_grad()
@pytest.mark.parametrize("text", ["a red apple", "word, " * 9 + "an end", "x" * 75, "x" * 76, "a very long " * 40])
def test_a_long_caption_is_read_in_chunks_as_compel_reads_it_and_as_serving_does(tiny_base: Path, text: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    encoders = TextEncoders(pipeline)
    read = encoders.tokenize([text])
    served = tokens_of_serving(pipeline.tokenizer, text)
    assert torch.equal(read.ids[0, 0], served.ids)
    brutal = SplitLongTextMode.BRUTAL  # full chunks, as serving has them; not at the ends of words
    compel = Compel(pipeline.tokenizer, pipeline.text_encoder, truncate_long_prompts=False, split_long_text_mode=brutal)
    torch.testing.assert_close(encoders(read.ids).states, compel.build_conditioning_tensor(text))


@torch.no_grad()
def test_shorter_ones_are_padded_with_empty_chunks_and_told_apart_by_length(tiny_base: Path) -> None:
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(tiny_base, local_files_only=True))
    captions = read_captions(encoders, examples(), cache=True, device=torch.device("cpu"))
    rows = captions.of(torch.tensor([0, 2, 1]))
    assert [(places.tolist(), chunks) for places, chunks in captions.by_length(rows)] == [([0, 2], 1), ([1], LONG)]
    alone = captions.embed(encoders, rows[:1], torch.device("cpu"), 1).states
    empty = captions.embed(encoders, torch.tensor([0]), torch.device("cpu"), 1).states
    padded = captions.embed(encoders, rows[:1], torch.device("cpu"), 3).states
    torch.testing.assert_close(padded, torch.cat([alone, empty, empty], dim=1))


def test_the_vectors_of_a_new_word_stay_in_one_chunk(tiny_base: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    names = ["<x>", "<x>_1", "<x>_2", "<x>_3"]
    tokenizer.add_tokens(names)
    ids = tokenizer.convert_tokens_to_ids(names)
    read = module.tokenize(tokenizer, "y" * 73 + " <x> z")
    assert [ids[0] in chunk for chunk in read.tolist()] == [False, True]
    assert read[1, 1:5].tolist() == ids


def test_what_serving_would_refuse_is_cut_and_that_is_said_once(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(tiny_base, local_files_only=True))
    told = [Example(str(index), Path(), (letter * 601,), "", (8, 8)) for index, letter in enumerate("abc")]
    captions = read_captions(encoders, told, cache=False, device=torch.device("cpu"))
    assert captions.tokens.shape[2] == MAX_CHUNKS
    assert [record.getMessage()[:63] for record in caplog.records] == [
        "3 captions have more than the 8 chunks of 75 tokens that a prom"
    ]


def test_captions_that_fit_say_nothing(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoders = TextEncoders(DiffusionPipeline.from_pretrained(tiny_base, local_files_only=True))
    read_captions(encoders, examples(), cache=False, device=torch.device("cpu"))
    assert not caplog.records
