"""Settings: how many steps run, whether a negative prompt is read, and each image's seed."""

from __future__ import annotations

from typing import Any

from scumble_server.request.settings import Settings


def settings(**changes: Any) -> Settings:
    plain = {"prompt": "a", "negative_prompt": "", "scheduler": "ddim", "seed": 7, "steps": 10, "width": 64}
    plain |= {"height": 64, "num_images": 1, "guidance_scale": 5.0, "scheduler_options": {}}
    return Settings(**plain | changes)


def test_only_the_steps_behind_the_first_run() -> None:
    assert settings().run_steps == 10
    assert settings(first_step=4).run_steps == 6


def test_guidance_of_one_or_less_is_none() -> None:
    assert (settings().guided, settings().guidance) == (True, 5.0)
    for scale in (1.0, 0.5, 0.0):
        assert (settings(guidance_scale=scale).guided, settings(guidance_scale=scale).guidance) == (False, 1.0)


def test_each_image_has_the_next_seed() -> None:
    assert settings(num_images=3).seeds == [7, 8, 9]
