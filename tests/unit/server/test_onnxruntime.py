"""A server with the ONNX Runtime executor draws what diffusers draws, and of every kind what torch draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from every_kind import EveryKind, publish_every_kind, request_for, ways_to_ask

from scumble.errors import Refused
from scumble.request import Adapter, Request
from scumble_registry import Registry

if TYPE_CHECKING:
    from .conftest import Running

LATENT_TOLERANCE = 1e-3
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 5, "guidance_scale": 5.0, "width": 64, "height": 64}


def request(**changes: object) -> Request:
    return Request.parse({**PLAIN, **changes})


CASES = {
    "no adapter": request(width=96, height=40, negative_prompt="blurry"),
    "two loras": request(adapters=[Adapter(ref="l/a", weight=0.3), Adapter(ref="l/b", weight=0.2, text_weight=0.6)]),
    "start and end": request(
        adapters=[Adapter(ref="l/a", weight=0.4, start=0.3), Adapter(ref="l/plain", weight=0.5, end=0.55)],
        num_images=2,
        scheduler="dpmpp_2m",
    ),
}


@pytest.fixture(scope="module")
def over_onnx(
    published: tuple[Path, dict[str, Path]], graph_cache: Path, start: Callable[..., Running]
) -> Iterator[Running]:
    home, files = published
    keep_graphs(home, graph_cache)
    started = start(home, "tiny/base", files, executor="onnxruntime")
    yield started
    started.service.close()


def keep_graphs(home: Path, graph_cache: Path) -> None:
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache" / "onnx").symlink_to(graph_cache)


@pytest.mark.parametrize("name", CASES)
def test_alone_equals_diffusers(over_onnx: Running, diffusers_alone: Callable[..., Any], name: str) -> None:
    ours = over_onnx.run([CASES[name]])[0]
    reference = diffusers_alone(over_onnx.files, CASES[name])
    assert (ours.latents - reference.latents).abs().max() <= LATENT_TOLERANCE
    assert np.abs(ours.done.images.astype(float) - reference.pixels).mean() <= 1.0
    assert ours.done.receipt["engine"]["executor"] == "onnxruntime"


@pytest.fixture(scope="module")
def both(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, graph_cache: Path, start: Callable[..., Running]
) -> Iterator[tuple[EveryKind, Running, Running]]:
    """Every kind of adapter, served by torch and by ONNX Runtime."""
    home = tmp_path_factory.mktemp("both")
    with Registry.open(home, create=True) as registry:
        every = publish_every_kind(registry, tiny_base, tmp_path_factory.mktemp("kinds"))
    keep_graphs(home, graph_cache)
    found = [start(home, every.base, every.files, executor=name) for name in ("torch", "onnxruntime")]
    yield every, found[0], found[1]
    for each in found:
        each.service.close()


def test_every_kind_in_one_batch_is_drawn_as_torch_draws_it(both: tuple[EveryKind, Running, Running]) -> None:
    every, torch_, onnx = both
    ways = {name: how for name, how in ways_to_ask(random.Random(3)).items() if name != "hyper/context"}
    shape = {"prompt": "a <bad> apple", "steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64}
    requests = [
        request_for(every, [{"ref": name, **how}], **shape, seed=seed) for seed, (name, how) in enumerate(ways.items())
    ]
    for ours, theirs in zip(onnx.run(requests), torch_.run(requests), strict=True):
        assert (ours.latents - theirs.latents).abs().max() <= LATENT_TOLERANCE
    assert onnx.service.stats()["mixed_steps"] > 0


def test_a_hypernetwork_in_self_attention_is_refused_by_name(both: tuple[EveryKind, Running, Running]) -> None:
    every, _, onnx = both
    asked = request_for(every, [{"ref": "hyper/context"}], prompt="a cat", steps=4)
    with pytest.raises(Refused, match=r"hyper/context.*--executor torch"):
        onnx.run([asked])
