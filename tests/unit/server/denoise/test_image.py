"""An active request reports its slowest image, each step once, and ends once; a mask keeps the original."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from scumble.errors import Refused
from scumble.events import Event, Failed, Preview, Step
from scumble_server.denoise.image import ActiveRequest, Conditioning, Image, MaskedOriginal
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.schedulers import table

CONFIG = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


def active(images: int, steps: int, **more: Any) -> tuple[ActiveRequest, list[Event]]:
    events: list[Event] = []
    request = ActiveRequest(events.append, lambda: False, lambda _: None, **more)
    nothing = Conditioning((), (), frozenset())
    shared = table("euler", CONFIG, steps)
    request.images = [Image(request, nothing, shared, 1.0, torch.zeros(4, 2, 2), Noise(0, 2, 2)) for _ in range(images)]
    return request, events


def test_the_slowest_image_is_reported_and_no_step_twice() -> None:
    request, events = active(2, 3)
    for moved in (0, 1, 0, 0, 1, 1):
        request.images[moved].step += 1
        request.report()
    assert events == [Step(1, 3), Step(2, 3), Step(3, 3)]


def test_steps_of_other_passes_count() -> None:
    request, events = active(1, 2, steps_before=5, steps_after=3)
    request.images[0].step = 1
    request.report()
    assert events == [Step(6, 10)]


def test_previews_come_as_often_as_asked_and_not_of_the_last_step() -> None:
    shown = np.zeros((1, 2, 2, 3), np.uint8)
    request, events = active(1, 4, preview=lambda step, steps, _: Preview(step, steps, shown), preview_every=2)
    for _ in range(4):
        request.images[0].step += 1
        request.report()
    assert [(type(event), event.step) for event in events if not isinstance(event, Failed)] == [
        (Step, 1),
        (Step, 2),
        (Preview, 2),
        (Step, 3),
        (Step, 4),
    ]


def test_a_request_ends_once() -> None:
    request, events = active(1, 1)
    first, second = Failed(Refused("one")), Failed(Refused("two"))
    request.fail(first)
    request.fail(second)
    assert events == [first]


def test_it_joins_with_its_first_step() -> None:
    request, _ = active(1, 1)
    assert request.joined_at is None
    request.join()
    joined = request.joined_at
    request.join()
    assert joined is not None and request.joined_at == joined


def test_what_a_mask_keeps_is_the_original_at_its_noise() -> None:
    picture, noise, sample = torch.randn(3, 4, 2, 2)
    mask = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    kept = MaskedOriginal(picture, noise, mask).restore(sample, torch.tensor([0.8, 0.6]))
    expected = torch.where(mask.bool(), sample, 0.8 * picture + 0.6 * noise)
    torch.testing.assert_close(kept, expected)
