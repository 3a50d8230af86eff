"""What an image begins with: diffusers' `add_noise`, and its order of random draws."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from scumble_server.denoise.image import ActiveRequest, Conditioning, Image
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.original import OriginalLatents, start_from
from scumble_server.denoise.schedulers import table
from scumble_server.executors.protocol import LatentDistribution

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SHAPE = (1, 4, 3, 5)


def image(start: int = 0) -> Image:
    request = ActiveRequest(lambda _: None, lambda: False, lambda _: None)
    made: Any = table("ddim", CONFIG, 10, start=start)
    return Image(request, Conditioning((), (), frozenset()), made, 1.0, torch.zeros(SHAPE[1:]), Noise(7, *SHAPE[2:]))


def latents(seed: int) -> LatentDistribution:
    mean, deviation = torch.randn((2, *SHAPE[1:]), generator=torch.Generator().manual_seed(seed))
    return LatentDistribution(mean, deviation.abs())


def draws() -> Any:
    generator = torch.Generator("cpu").manual_seed(7)
    while True:
        yield randn_tensor(SHAPE, generator)[0]


def noised(picture: Tensor, noise: Tensor, start: int) -> Tensor:
    scheduler = DDIMScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    return scheduler.add_noise(picture, noise, scheduler.timesteps[start : start + 1])


def test_without_an_original_it_is_noise() -> None:
    fresh = image()
    start_from(fresh, None)
    assert torch.equal(fresh.sample, next(draws()))
    assert fresh.original is None


def test_a_picture_is_sampled_first_and_noised_as_diffusers_does() -> None:
    drawn, begun, picture = draws(), image(start=4), latents(1)
    start_from(begun, OriginalLatents(picture))
    sampled = picture.mean + picture.deviation * next(drawn)
    torch.testing.assert_close(begun.sample, noised(sampled, next(drawn), 4))


def test_of_a_masked_picture_the_kept_part_is_remembered() -> None:
    drawn, begun, picture = draws(), image(start=4), latents(1)
    mask = torch.ones(1, *SHAPE[2:])
    start_from(begun, OriginalLatents(picture, mask, latents(2)))
    sampled, fresh = picture.mean + picture.deviation * next(drawn), next(drawn)
    assert begun.original is not None
    torch.testing.assert_close(begun.original.picture, sampled)
    torch.testing.assert_close(begun.original.noise, fresh)
    assert begun.inpaint_channels is None


def test_at_full_strength_a_masked_picture_begins_with_noise_alone() -> None:
    drawn, begun = draws(), image()
    start_from(begun, OriginalLatents(latents(1), torch.ones(1, *SHAPE[2:]), latents(2), pure_noise=True))
    next(drawn)  # the picture, which is kept
    torch.testing.assert_close(begun.sample, next(drawn))
    assert begun.original is not None


def test_a_base_for_inpainting_reads_mask_and_masked_picture_beside_the_sample() -> None:
    drawn, begun, masked = draws(), image(), latents(2)
    mask = torch.rand(1, *SHAPE[2:])
    start_from(begun, OriginalLatents(latents(1), mask, masked, pure_noise=True, inpaints=True))
    torch.testing.assert_close(begun.sample, next(drawn), msg="no picture is drawn where none is read")
    assert begun.original is None
    assert begun.inpaint_channels is not None
    assert torch.equal(begun.inpaint_channels[:1], mask)
    torch.testing.assert_close(begun.inpaint_channels[1:], masked.mean + masked.deviation * next(drawn))
