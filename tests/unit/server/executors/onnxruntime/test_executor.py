"""ONNX Runtime draws every kind in one batch as torch does. Oracle tests hold it to diffusers (`every_executor`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scumble.errors import Refused
from scumble_registry import Registry
from support.every_kind import EveryKind, publish_every_kind, request_for, ways_to_ask

if TYPE_CHECKING:
    from support.running import Running

LATENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def both(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]
) -> Iterator[tuple[EveryKind, Running, Running]]:
    """Every kind of adapter, served by torch and by ONNX Runtime."""
    home = tmp_path_factory.mktemp("both")
    with Registry.open(home, create=True) as registry:
        every = publish_every_kind(registry, tiny_base, tmp_path_factory.mktemp("kinds"))
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
    assert onnx.service.stats().mixed_steps > 0


def test_a_hypernetwork_in_self_attention_is_refused_by_name(both: tuple[EveryKind, Running, Running]) -> None:
    every, _, onnx = both
    asked = request_for(every, [{"ref": "hyper/context"}], prompt="a cat", steps=4)
    with pytest.raises(Refused, match=r"hyper/context.*--executor torch"):
        onnx.run([asked])
