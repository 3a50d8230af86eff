"""The denoising loss, and the validation loss: the same on held-out pictures with fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

from scumble.errors import Incompatible
from scumble_trainers.data.latents import Latents
from scumble_trainers.draws import generator

Schedule: TypeAlias = Any
"""A DDPMScheduler, the forward process. diffusers sets its `config` at run time."""

Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(noisy (B, C, h, w), timesteps (B,)) -> (B, C, h, w)`: a UNet with its conditioning."""

PredictFor: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same with the pictures' indices `(B,)` as first argument."""


def noise_schedule(config: dict[str, object]) -> Schedule:
    """Make the forward process of a base from its scheduler's configuration. Raises for an unknown prediction type."""
    schedule: Schedule = DDPMScheduler.from_config(config)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise Incompatible(f"cannot train for prediction type {kind!r}: epsilon and v_prediction are supported")
    return schedule


def denoising_loss(
    schedule: Schedule,
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Return squared errors `(B,)` of the predicted epsilon or v, min-SNR weighted if a gamma is given."""
    predicted = predict(schedule.add_noise(latents, noise, timesteps), timesteps)
    velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = functional.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(compute_snr(schedule, timesteps), min_snr_gamma, velocity=velocity)


def min_snr_weight(snr: Tensor, gamma: float, *, velocity: bool) -> Tensor:
    """Return min-SNR-γ weights (2303.09556): min(SNR, γ) / SNR for epsilon, min(SNR, γ) / (SNR + 1) for v."""
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)


@torch.no_grad()
def validation_loss(
    schedule: Schedule,
    predict: PredictFor,
    latents: Latents,
    pictures: Tensor,
    *,
    device: torch.device,
    seed: int,
    levels: int = 4,
    batch: int = 32,
) -> float:
    """Return the mean loss of `pictures (n,)` at `levels` evenly spaced timesteps.

    A picture's noise depends only on `seed` and its index, so losses of different models or steps are comparable.
    """
    length = schedule.config.num_train_timesteps
    noise = {picture: _noise(latents, picture, seed, levels) for picture in pictures.tolist()}
    losses = []
    for group in latents.by_size(pictures):
        rows = [(level, picture) for level in range(levels) for picture in group.tolist()]
        for share in (rows[start : start + batch] for start in range(0, len(rows), batch)):
            chosen = torch.tensor([picture for _, picture in share])
            timesteps = torch.tensor([int((level + 0.5) / levels * length) for level, _ in share], device=device)
            drawn = torch.stack([noise[picture][level] for level, picture in share]).to(device)
            known = partial(predict, chosen)
            losses.append(denoising_loss(schedule, known, latents.means(chosen).to(device), drawn, timesteps))
    return float(torch.cat(losses).mean())


def _noise(latents: Latents, picture: int, seed: int, levels: int) -> Tensor:
    """Draw a picture's noise, `(levels, C, h, w)`."""
    return torch.randn((levels, *latents.shape(picture)), generator=generator(seed, "validation", picture))
