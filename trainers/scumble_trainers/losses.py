"""The denoising loss, and the same loss made comparable: on held-out pictures with fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

from scumble.errors import Incompatible
from scumble_trainers.draws import generator

Schedule: TypeAlias = Any
"""A DDPMScheduler: the forward process. diffusers sets its `config` at run time."""

Predict: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(noisy (B, C, h, w), timesteps (B,), text (B, T, D)) -> (B, C, h, w)`: a UNet."""


def noise_schedule(config: dict[str, object]) -> Schedule:
    """The forward process of a base, from its scheduler's configuration."""
    schedule: Schedule = DDPMScheduler.from_config(config)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise Incompatible(f"cannot train for prediction type {kind!r}: epsilon and v_prediction are known")
    return schedule


def denoising_loss(
    schedule: Schedule,
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: Tensor,
    *,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """`(B,)` squared errors of the predicted epsilon or v, min-SNR weighted if a gamma is given."""
    predicted = predict(schedule.add_noise(latents, noise, timesteps), timesteps, text)
    velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = functional.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(compute_snr(schedule, timesteps), min_snr_gamma, velocity=velocity)


def min_snr_weight(snr: Tensor, gamma: float, *, velocity: bool) -> Tensor:
    """Min-SNR-γ (2303.09556): min(SNR, γ) / SNR for epsilon, min(SNR, γ) / (SNR + 1) for v."""
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)


@torch.no_grad()
def validation_loss(
    schedule: Schedule,
    predict: Predict,
    latents: Tensor,
    text: Tensor,
    *,
    seed: int,
    levels: int = 4,
    batch: int = 32,
) -> float:
    """Mean loss of `latents (N, C, h, w)` with `text (N, T, D)` at `levels` evenly spaced timesteps.

    The noise depends on `seed` alone, so two models, or one at two steps, are compared on equal terms.
    """
    count, length = len(latents), schedule.config.num_train_timesteps
    noise = torch.randn((levels * count, *latents.shape[1:]), generator=generator(seed, "validation"))
    timesteps = ((torch.arange(levels) + 0.5) / levels * length).long().repeat_interleave(count)
    pictures = torch.arange(count).repeat(levels)
    losses = [
        denoising_loss(
            schedule,
            predict,
            latents[pictures[share]],
            noise[share].to(latents),
            timesteps[share].to(latents.device),
            text[pictures[share]],
        )
        for share in (slice(start, start + batch) for start in range(0, levels * count, batch))
    ]
    return float(torch.cat(losses).mean())
