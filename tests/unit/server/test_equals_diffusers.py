"""A request alone equals diffusers' own pipeline; a batch of strangers equals each of them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from scumble.request import Adapter, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.running import Running

pytestmark = pytest.mark.every_executor
LATENT_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 1.0
VISIBLE = 50 * LATENT_TOLERANCE

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}


def request(**changes: object) -> Request:
    return Request.parse({**PLAIN, **changes})


CASES = {
    "no adapter": request(),
    "euler": request(scheduler="euler"),
    "dpmpp_2m": request(scheduler="dpmpp_2m", steps=11),
    "no guidance": request(guidance_scale=1.0),
    "negative prompt": request(negative_prompt="blurry"),
    "empty prompt": request(prompt=""),
    "not square": request(width=96, height=40),
    "several images": request(num_images=3),
    "one lora": request(adapters=[Adapter(ref="l/a", weight=0.4)]),
    "negative weight": request(adapters=[Adapter(ref="l/a", weight=-0.3)], scheduler="euler"),
    "unet only": request(adapters=[Adapter(ref="l/plain", weight=0.5)], scheduler="dpmpp_2m"),
    "text only": request(adapters=[Adapter(ref="l/b", weight=0.0, text_weight=1.0)]),
    "full layout": request(adapters=[Adapter(ref="l/full", weight=0.3)]),
    "full layout beside small": request(
        adapters=[Adapter(ref="l/a", weight=0.2), Adapter(ref="l/full", weight=-0.2)], width=72, height=56
    ),
    "block weights": request(
        adapters=[
            Adapter(ref="l/a", weight=0.5, blocks={"down_blocks.0": 0.2, "mid_block": 0.0, "up_blocks.1": 1.5}),
            Adapter(ref="l/b", weight=0.1),
        ]
    ),
    "start and end": request(
        steps=10,
        adapters=[Adapter(ref="l/a", weight=0.4, start=0.3), Adapter(ref="l/plain", weight=0.5, start=0.1, end=0.55)],
    ),
    "two loras": request(adapters=[Adapter(ref="l/a", weight=0.3), Adapter(ref="l/b", weight=0.2, text_weight=0.6)]),
    "three loras, two images": request(
        adapters=[Adapter(ref="l/plain", weight=0.2), Adapter(ref="l/b", weight=-0.1), Adapter(ref="l/a", weight=0.2)],
        num_images=2,
        scheduler="euler",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_alone_equals_diffusers(running: Running, diffusers_alone: Callable[..., Any], name: str) -> None:
    ours = running.run([CASES[name]])[0]
    reference = diffusers_alone(running.files, CASES[name])
    assert (ours.latents - reference.latents).abs().max() <= LATENT_TOLERANCE
    assert np.abs(ours.done.images.astype(float) - reference.pixels).mean() <= PIXEL_TOLERANCE
    if CASES[name].adapters:
        bare = diffusers_alone(running.files, CASES[name].model_copy(update={"adapters": ()}))
        assert (reference.latents - bare.latents).abs().max() >= VISIBLE, "the oracle shows nothing"


def test_a_batch_of_eight_equals_each_alone(running: Running) -> None:
    square = [each for each in CASES.values() if each.width == each.height and each.num_images == 1][:8]
    mixed = [each.model_copy(update={"seed": 100 + i, "steps": 8 + i % 3}) for i, each in enumerate(square)]
    before = running.service.stats()
    together = running.run(mixed)
    after = running.service.stats()
    for each, batched in zip(mixed, together, strict=True):
        alone = running.run([each])[0]
        assert (batched.latents - alone.latents).abs().max() <= LATENT_TOLERANCE
        assert np.abs(batched.done.images.astype(float) - alone.done.images).mean() <= PIXEL_TOLERANCE
    assert after.mixed_steps - before.mixed_steps >= 8
    assert after.steps - before.steps < sum(each.steps or 0 for each in mixed) / 2
