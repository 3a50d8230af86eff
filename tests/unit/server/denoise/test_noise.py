"""Noise is what diffusers draws with a generator on the CPU, and a step that is tried again gets the same."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from scumble_server.denoise.noise import Noise


def test_it_is_drawn_as_diffusers_draws_it() -> None:
    noise, generator = Noise(7, 5, 3), torch.Generator("cpu").manual_seed(7)
    shape = (1, 4, 5, 3)
    assert torch.equal(noise.draw(), randn_tensor(shape, generator)[0])
    for step in (0, 1, 4):
        assert torch.equal(noise.of_step(step), randn_tensor(shape, generator)[0])


def test_a_step_that_is_tried_again_gets_the_same() -> None:
    noise = Noise(7, 5, 3)
    first = noise.of_step(3)
    assert torch.equal(noise.of_step(3), first)
    assert not torch.equal(noise.of_step(4), first)


def test_seeds_differ() -> None:
    assert not torch.equal(Noise(7, 5, 3).draw(), Noise(8, 5, 3).draw())
