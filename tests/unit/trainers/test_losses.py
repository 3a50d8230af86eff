"""The loss against the formulas of its papers, with diffusers' forward process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scumble.errors import Incompatible
from scumble_trainers.data.latents import Latents
from scumble_trainers.losses import denoising_loss, min_snr_weight, noise_schedule, validation_loss

LATENTS, NOISE = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
TIMESTEPS = torch.tensor([10, 500, 990])
PICTURES = Latents(LATENTS.unbind(0), torch.zeros_like(LATENTS).unbind(0))
CPU = torch.device("cpu")


def zero(noisy: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(noisy)


def none(_: Tensor, noisy: Tensor, __: Tensor) -> Tensor:
    return torch.zeros_like(noisy)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_costs_nothing(kind: str) -> None:
    schedule = noise_schedule({"prediction_type": kind})
    signal = schedule.alphas_cumprod[TIMESTEPS].sqrt()[:, None, None, None]
    rest = (1 - schedule.alphas_cumprod[TIMESTEPS]).sqrt()[:, None, None, None]
    perfect = NOISE if kind == "epsilon" else signal * NOISE - rest * LATENTS
    loss = denoising_loss(schedule, lambda *_: perfect, LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)


def test_min_snr_caps_what_easy_timesteps_weigh() -> None:
    schedule = noise_schedule({"prediction_type": "epsilon"})
    plain = denoising_loss(schedule, zero, LATENTS, NOISE, TIMESTEPS)
    weighted = denoising_loss(schedule, zero, LATENTS, NOISE, TIMESTEPS, min_snr_gamma=5)
    signal = schedule.alphas_cumprod[TIMESTEPS]
    snr = signal / (1 - signal)
    torch.testing.assert_close(weighted / plain, torch.minimum(snr, torch.tensor(5.0)) / snr)
    torch.testing.assert_close(min_snr_weight(snr, 5, velocity=True), snr.clamp(max=5) / (snr + 1))


def test_validation_is_deterministic_and_needs_no_gradient() -> None:
    schedule = noise_schedule({})
    every = torch.arange(3)

    def loss(pictures: Tensor = every, **options: Any) -> float:
        return validation_loss(schedule, none, PICTURES, pictures, device=CPU, **({"seed": 1} | options))

    assert [loss(batch=size) for size in (1, 2, 16)] == pytest.approx([loss()] * 3)
    assert loss(seed=2) != loss()
    assert sum(loss(every[i : i + 1]) for i in range(3)) / 3 == pytest.approx(loss())


def test_pictures_of_several_sizes_are_measured_together() -> None:
    schedule = noise_schedule({})
    mixed = Latents((LATENTS[0], torch.zeros(4, 2, 4)), (LATENTS[0], torch.zeros(4, 2, 4)))
    both, square, wide = (
        validation_loss(schedule, none, mixed, torch.tensor(pictures), device=CPU, seed=1)
        for pictures in ([0, 1], [0], [1])
    )
    assert both == pytest.approx((square + wide) / 2)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(Incompatible, match="sample"):
        noise_schedule({"prediction_type": "sample"})
