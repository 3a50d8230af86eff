"""A batch guides and rescales as diffusers' pipelines do, image by image; only the denoiser is another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from scumble_build.graphs.inputs import StepInputs
from scumble_server.denoise.batch import Batch
from scumble_server.denoise.image import ActiveRequest, Conditioning, Image
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.phase import Phase
from scumble_server.denoise.schedulers import table

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
STEPS = 4


class Echo:
    """Predicts from sample, timestep and text, so that whatever reaches the wrong row is seen."""

    device = "cpu"

    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        return torch.sin(sample + inputs.kv.mean((1, 2)).view(-1, 1, 1, 1)) + timestep.view(-1, 1, 1, 1) / 1000


ECHO: Any = Echo()


def image(texts: list[float], guidance: float, seed: int, **more: Any) -> Image:
    """`texts` are the negative prompt, if there is one, and prompts."""
    request = ActiveRequest(lambda _: None, lambda: False, lambda _: None)
    kv = torch.tensor(texts).view(-1, 1, 1).expand(-1, 3, 2)
    weights = more.pop("prompt_weights", (1.0,))
    digests = frozenset(more.pop("adapters", ()))
    conditioning = Conditioning((Phase(ECHO, kv),), (0,) * STEPS, digests, weights)
    noise = Noise(seed, 4, 4)
    return Image(request, conditioning, table("ddim", CONFIG, STEPS), guidance, noise.draw(), noise, **more)


def drawn(texts: list[float], guidance: float, seed: int, rescale: float = 0.0) -> Tensor:
    """By diffusers' scheduler and the formulas of its pipelines."""
    scheduler = DDIMScheduler(**CONFIG)
    scheduler.set_timesteps(STEPS)
    sample = Noise(seed, 4, 4).draw()[None]
    for timestep in scheduler.timesteps:
        kv = torch.tensor(texts).view(-1, 1, 1)
        rows = sample.expand(len(texts), -1, -1, -1)
        output = ECHO.denoise(rows, timestep.repeat(len(texts)), StepInputs(kv))
        guided = output[:1]
        if len(texts) == 2:
            guided = output[:1] + guidance * (output[1:] - output[:1])
            if rescale:
                guided = rescale_noise_cfg(guided, output[1:], rescale)
        sample = scheduler.step(guided, timestep, sample).prev_sample
    return sample[0]


def finish(*images: Image) -> None:
    batch = Batch(images)
    for _ in range(STEPS):
        assert batch.fits(images)
        batch.advance()


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guided_and_rescaled_as_diffusers_does(rescale: float) -> None:
    one = image([0.1, 0.9], 7.5, 3, rescale=rescale)
    finish(one)
    torch.testing.assert_close(one.sample, drawn([0.1, 0.9], 7.5, 3, rescale), atol=1e-5, rtol=1e-5)


def test_strangers_in_a_batch_are_each_as_alone() -> None:
    cases: list[tuple[list[float], float, int, float]] = [
        ([0.4], 1.0, 1, 0.0),
        ([0.1, 0.9], 7.5, 2, 0.7),
        ([0.3, 0.2], 2.0, 3, 0.0),
    ]
    images = [image(texts, guidance, seed, rescale=rescale) for texts, guidance, seed, rescale in cases]
    finish(*images)
    for mine, (texts, guidance, seed, rescale) in zip(images, cases, strict=True):
        torch.testing.assert_close(mine.sample, drawn(texts, guidance, seed, rescale), atol=1e-5, rtol=1e-5)


def test_prompts_act_against_the_negative_prompt_at_their_weights() -> None:
    """Composable diffusion (Liu et al.): ε = ε₀ + g Σ wᵢ (εᵢ − ε₀). Twice the same at half is once."""
    once = image([0.1, 0.9], 5.0, 4)
    twice = image([0.1, 0.9, 0.9], 5.0, 4, prompt_weights=(0.5, 0.5))
    finish(once, twice)
    torch.testing.assert_close(once.sample, twice.sample, atol=1e-5, rtol=1e-5)


def test_it_fits_its_own_images_alone() -> None:
    one, other = image([0.1], 1.0, 1), image([0.2], 1.0, 2)
    batch = Batch([one, other])
    assert batch.fits([other, one])
    assert not batch.fits([one])
    assert not batch.fits([one, image([0.2], 1.0, 2)])
    assert batch.model_rows == 2


def test_a_batch_is_mixed_where_adapters_differ() -> None:
    plain, same, adapted = image([0.1], 1.0, 1), image([0.1], 1.0, 2), image([0.1], 1.0, 3, adapters=("sha256:a",))
    assert not Batch([plain, same]).mixed()
    assert Batch([plain, adapted]).mixed()
