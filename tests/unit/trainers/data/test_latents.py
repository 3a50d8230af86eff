"""Latents of pictures of several sizes: the autoencoder's own, kept as long as nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from scumble_trainers.data import latents as module
from scumble_trainers.data.buckets import Size
from scumble_trainers.data.dataset import Example, load_picture, read_examples
from scumble_trainers.data.latents import Latents, cached_latents, pixels

SIZES: list[Size] = [(16, 16), (32, 16), (16, 32)]


@pytest.fixture
def vae(base_folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(base_folder / "vae", local_files_only=True)


@pytest.fixture
def examples(make_data: Any) -> list[Example]:
    return read_examples(make_data(6, *SIZES), resolution=16)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were really encoded, by call."""
    calls: list[int] = []
    original = module.encode_pictures

    def count(vae: Any, examples: Any, *rest: Any, **more: Any) -> Latents:
        calls.append(len(examples))
        return original(vae, examples, *rest, **more)

    monkeypatch.setattr(module, "encode_pictures", count)
    return calls


@torch.no_grad()
def test_each_is_what_the_autoencoder_says_at_its_size(vae: Any, examples: list[Example], tmp_path: Path) -> None:
    latents = cached_latents(tmp_path, vae, examples, SIZES * 2)
    for index, (example, size) in enumerate(zip(examples, SIZES * 2, strict=True)):
        posterior = vae.encode(pixels(load_picture(example.path, size))[None]).latent_dist
        assert latents.shape(index) == (4, size[1] // 2, size[0] // 2)
        torch.testing.assert_close(latents.mean[index], posterior.mean[0] * vae.config.scaling_factor)
        torch.testing.assert_close(latents.std[index], posterior.std[0] * vae.config.scaling_factor)


def test_groups_are_of_one_size_and_hold_every_picture(vae: Any, examples: list[Example], tmp_path: Path) -> None:
    latents = cached_latents(tmp_path, vae, examples, SIZES * 2)
    groups = latents.by_size(torch.tensor([5, 0, 1, 2, 3]))
    assert sorted(group.tolist() for group in groups) == [[0, 3], [1], [5, 2]]
    for group in groups:
        assert len(latents.sample(group, torch.zeros(len(group), *latents.shape(int(group[0]))))) == len(group)


def test_they_are_encoded_once(vae: Any, examples: list[Example], tmp_path: Path, encoded: list[int]) -> None:
    first = cached_latents(tmp_path, vae, examples, SIZES * 2)
    again = cached_latents(tmp_path, vae, examples, SIZES * 2)
    assert encoded == [6]
    assert all(torch.equal(one, other) for one, other in zip(first.mean, again.mean, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(first.std, again.std, strict=True))


@pytest.mark.parametrize("change", ["picture", "size", "autoencoder", "fewer"])
def test_they_are_encoded_again_when_anything_changed(
    vae: Any, examples: list[Example], tmp_path: Path, encoded: list[int], change: str
) -> None:
    cached_latents(tmp_path, vae, examples, SIZES * 2)
    sizes, data = SIZES * 2, examples[0].path.parent
    if change == "picture":
        Image.new("RGB", (16, 16), "red").save(examples[0].path)
        examples = read_examples(data, resolution=16)
    if change == "size":
        sizes = [(16, 16)] * 6
    if change == "autoencoder":
        next(vae.parameters()).data.add_(1e-3)
    if change == "fewer":
        lines = (data / "metadata.jsonl").read_text().splitlines()[:3]
        (data / "part.jsonl").write_text("\n".join(lines))
        examples, sizes = read_examples(data / "part.jsonl", resolution=16), SIZES
    assert len(cached_latents(tmp_path, vae, examples, sizes)) == len(examples)
    assert len(encoded) == 2


def test_a_change_of_captions_alone_keeps_them(
    vae: Any, examples: list[Example], tmp_path: Path, encoded: list[int]
) -> None:
    cached_latents(tmp_path, vae, examples, SIZES * 2)
    metadata = examples[0].path.parent / "metadata.jsonl"
    lines = [{**json.loads(line), "text": "another"} for line in metadata.read_text().splitlines()]
    metadata.write_text("\n".join(map(json.dumps, lines)))
    cached_latents(tmp_path, vae, read_examples(metadata.parent, resolution=16), SIZES * 2)
    assert len(encoded) == 1
