"""The bundled base and its style LoRAs: what ships is drawn as diffusers draws it."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from scumble.events import Done, Event, Failed, Preview
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_registry.results import publish_result
from support.places import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.running import Running

pytestmark = pytest.mark.every_executor
STYLES = ("openmoji", "ink")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("demo")
    files = {"base": DEMO / "base"}
    with Registry.open(home, create=True) as registry:
        registry.publish(DEMO / "base", name="scumble/demo")
        for style in STYLES:
            folder = DEMO / "adapters" / "lora" / style
            publish_result(registry, folder, f"styles/{style}", base="scumble/demo")
            files[f"styles/{style}"] = folder / "pytorch_lora_weights.safetensors"
    running = start(home, "scumble/demo", files)
    yield running
    running.service.close()


@pytest.mark.parametrize("styles", [(), ("openmoji",), ("openmoji", "ink")])
def test_alone_equals_diffusers(demo: Running, diffusers_alone: Callable[..., Any], styles: tuple[str, ...]) -> None:
    request = Request(
        prompt="a red apple, noto style",
        seed=11,
        steps=8,
        guidance_scale=5.0,
        width=128,
        height=128,
        scheduler="ddim",
        adapters=tuple(Adapter(ref=f"styles/{style}", weight=0.7) for style in styles),
    )
    ours = demo.run([request])[0]
    reference = diffusers_alone(demo.files, request)
    assert (ours.latents - reference.latents).abs().max() <= 1e-3
    assert np.abs(ours.done.images.astype(float) - reference.pixels).mean() <= 1
    if styles:
        bare = diffusers_alone(demo.files, request.model_copy(update={"adapters": ()}))
        assert (reference.latents - bare.latents).abs().max() >= 0.05, "the oracle shows nothing"


def test_a_preview_looks_like_the_picture(demo: Running) -> None:
    request = Request(
        prompt="a red apple, noto style", seed=11, steps=10, width=128, height=128, options={"preview_every": 3}
    )
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    demo.service.submit(request, events.put)
    previews = []
    while not isinstance(event := events.get(timeout=120), Done | Failed):
        if isinstance(event, Preview):
            previews.append(event)
    assert isinstance(event, Done)
    assert [preview.step for preview in previews] == [3, 6, 9]
    small = event.images.reshape(1, 16, 8, 16, 8, 3).mean((2, 4))
    likeness = [np.corrcoef(preview.images.ravel(), small.ravel())[0, 1] for preview in previews]
    assert likeness[-1] >= 0.8
    assert likeness == sorted(likeness)
