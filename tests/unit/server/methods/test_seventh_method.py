"""A seventh method is three modules and three lines in tables; nothing else is edited (`support/steering`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import scumble_registry.formats
import scumble_trainers.methods
from scumble.errors import InvalidRequest
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_registry.exporting import export
from scumble_server.methods import METHODS
from scumble_trainers.command import train_and_publish
from support.oracle import diffusers_scheduler
from support.running import Running
from support.steering.format import FORMAT, KIND, TENSOR
from support.steering.method import SteeringMethod
from support.steering.training import ENTRY

TOLERANCE = 1e-3
WIDTH = 32
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 4, "guidance_scale": 3.0, "width": 64, "height": 64}


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The three lines."""
    monkeypatch.setattr(scumble_registry.formats, "FORMATS", (FORMAT, *scumble_registry.formats.FORMATS))
    monkeypatch.setitem(METHODS, KIND, SteeringMethod())
    monkeypatch.setattr(scumble_trainers.methods, "METHODS", (*scumble_trainers.methods.METHODS, ENTRY))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def home(tiny_base: Path, tmp_path: Path) -> Path:
    """A registry with the base and two vectors, `s/one` and `s/two`."""
    folder = tmp_path / "home"
    with Registry.open(folder, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        for seed, name in enumerate(("s/one", "s/two")):
            file = tmp_path / f"{seed}.safetensors"
            save_file({TENSOR: torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))}, file)
            registry.publish(file, name=name, base="tiny/base")
    return folder


@pytest.fixture
def running(home: Path, start: Callable[..., Running]) -> Iterator[Running]:
    started = start(home, "tiny/base", {})
    yield started
    started.service.close()


def steered(base: Path, request: Request, vector: Tensor) -> Tensor:
    """diffusers' latents where `vector` is added to what it encodes."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers_scheduler(request, dict(pipeline.scheduler.config))
    states, negative = pipeline.encode_prompt(request.prompt, "cpu", 1, do_classifier_free_guidance=True)
    latents: Tensor = pipeline(
        prompt_embeds=states + vector,
        negative_prompt_embeds=negative + vector,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        generator=torch.Generator("cpu").manual_seed(request.seed or 0),
        output_type="latent",
    ).images
    return latents


def one_at(weight: float) -> Adapter:
    return Adapter(ref="s/one", weight=weight)


def test_it_is_published_exported_and_drawn_beside_others(
    running: Running, home: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with Registry.open(home) as registry:
        assert registry.resolve("s/one").manifest.kind == KIND
        export(registry, "s/one", "diffusers", tmp_path / "exported")
        vectors = {name: registry.materialise(registry.resolve(name)) for name in ("s/one", "s/two")}
        one, two = (load_file(next(folder.glob("*.safetensors")))[TENSOR] for folder in vectors.values())
    (exported,) = (tmp_path / "exported").glob("*.safetensors")
    assert torch.equal(load_file(exported)[TENSOR], one)
    asked = [
        Request.parse({**PLAIN, "adapters": adapters})
        for adapters in ([one_at(0.8)], [Adapter(ref="s/two")], [one_at(0.5), Adapter(ref="s/two", weight=-0.5)], [])
    ]
    drawn = [result.latents for result in running.run(asked)]
    for latents, request, vector in zip(drawn, asked, (0.8 * one, two, 0.5 * (one - two), 0 * one), strict=True):
        assert (latents - steered(tiny_base, request, vector)).abs().max() <= TOLERANCE
    assert (drawn[0] - drawn[3]).abs().max() >= 50 * TOLERANCE


def test_it_acts_between_start_and_end_and_refuses_what_it_does_not_read(running: Running) -> None:
    whole, half_way, never = (
        running.run([Request.parse({**PLAIN, "adapters": [{"ref": "s/one", **change}]})])[0]
        for change in ({}, {"end": 0.5}, {"weight": 0.0})
    )
    assert not torch.equal(whole.latents, half_way.latents)
    assert [entry.ref for entry in never.done.receipt.dropped] == ["s/one"]
    assert [entry.kind for entry in whole.done.receipt.adapters] == [KIND]
    with pytest.raises(InvalidRequest, match="is a steering, for which token means nothing"):
        running.run([Request.parse({**PLAIN, "adapters": [Adapter(ref="s/one", token="x")]})])


def test_it_is_trained_and_published(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCUMBLE_HOME", str(home))
    data = tmp_path / "data"
    data.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(data / f"{index}.png")
    lines = (f'{{"file_name": "{index}.png", "text": "a plain colour"}}' for index in range(3))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    common: dict[str, Any] = {"base": "tiny/base", "data": data, "config": None, "publish": "s/trained", "alias": None}
    common |= {"staged": False, "out": tmp_path / "out", "fresh": False, "evaluate": False, "as_json": True}
    settings = ENTRY.settings(steps=2, batch_size=2, validation=0.0, sample_steps=2, save_dtype="fp32")
    told = train_and_publish(ENTRY, common, settings)
    assert told is not None
    with Registry.open(home) as registry:
        version = registry.resolve("s/trained")
        assert version.manifest.kind == KIND
        assert version.manifest.provenance["trainer"] == KIND
