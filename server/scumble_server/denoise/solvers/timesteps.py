"""Solvers that go by the training's own timesteps: ᾱ (`alphas_cumprod`) of the timestep and of an earlier one.

DDIM (Song et al., 2010.02502), LCM (Luo et al., 2310.04378), TCD (Zheng et al., 2402.19159).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scumble_server.denoise.solvers.forms import Inputs, Update, inputs
from scumble_server.denoise.solvers.prediction import noise, original

_SIGMA_DATA = 0.5


def ddim(scheduler: Any, start: int, eta: float) -> Update:
    """Return DDIM's step, equations (12) and (16)."""
    timesteps, given = _begin(scheduler, start)
    now = _alphas(scheduler, timesteps)
    before = _alphas(scheduler, timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps)
    x0, epsilon = _predicted(scheduler, now, given)
    deviation = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    x = before.sqrt() * x0 + _direction(now.float(), before.float(), eta) * epsilon + deviation * given.n
    return _update(now, x, x0, torch.full_like(timesteps, eta > 0, dtype=torch.bool))


def _direction(now: Tensor, before: Tensor, eta: float) -> Tensor:
    """The factor of ε̂ in equation (12), in float32 as diffusers.

    With eta 1 at a timestep without signal all of it is noise, and rounding decides whether there is a root: where
    diffusers draws what is not a number, nothing is served.
    """
    deviation = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    return (1 - before - deviation**2).double().sqrt()


def lcm(scheduler: Any, start: int, _eta: float) -> Update:
    """Return LCM's multistep sampling: c_skip·x + c_out·x̂₀, by its boundary condition, and noise for the next step."""
    timesteps, given = _begin(scheduler, start)
    now = _alphas(scheduler, timesteps)
    before = _alphas(scheduler, torch.cat([timesteps[1:], timesteps[-1:]]))
    x0, _ = _predicted(scheduler, now, given)
    scaled = (timesteps.double() * scheduler.config.timestep_scaling)[:, None]
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + _SIGMA_DATA**2).sqrt()
    denoised = c_out * x0 + c_skip * given.x
    draws = _all_but_last(timesteps)
    x = torch.where(draws[:, None], before.sqrt() * denoised + (1 - before).sqrt() * given.n, denoised)
    return _update(now, x, denoised, draws)


def tcd(scheduler: Any, start: int, eta: float) -> Update:
    """Return TCD's strategic stochastic sampling; eta is its gamma: down to s = (1 − γ)·t′, and by noise up to t′."""
    timesteps, given = _begin(scheduler, start)
    earlier = torch.cat([timesteps[1:], torch.zeros_like(timesteps[:1])])
    now, before = _alphas(scheduler, timesteps), _alphas(scheduler, earlier)
    # In float32, as diffusers: which timestep a product is rounded down to depends on it.
    between = _alphas(scheduler, ((1 - eta) * earlier.float()).floor().long())
    x0, epsilon = _predicted(scheduler, now, given)
    x = between.sqrt() * x0 + (1 - between).sqrt() * epsilon
    draws = _all_but_last(timesteps) & (eta > 0)
    noised = (before / between).sqrt() * x + (1 - before / between).sqrt() * given.n
    return _update(now, torch.where(draws[:, None], noised, x), x0, draws)


def _begin(scheduler: Any, start: int) -> tuple[Tensor, Inputs]:
    timesteps: Tensor = scheduler.timesteps[start:]
    return timesteps, inputs(len(timesteps))


def _alphas(scheduler: Any, timesteps: Tensor) -> Tensor:
    """ᾱ of timesteps, `(steps, 1)`; before the first of the training it is what the config says."""
    alphas = scheduler.alphas_cumprod.double()[timesteps.clamp(min=0)]
    return torch.where(timesteps >= 0, alphas, scheduler.final_alpha_cumprod.double())[:, None]


def _predicted(scheduler: Any, alphas: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    """x̂₀ and ε̂."""
    asked = (scheduler.config.prediction_type, alphas.sqrt(), (1 - alphas).sqrt(), given.x, given.m)
    return original(*asked), noise(*asked)


def _all_but_last(timesteps: Tensor) -> Tensor:
    return torch.arange(len(timesteps)) < len(timesteps) - 1


def _update(alphas: Tensor, x: Tensor, estimate: Tensor, draws: Tensor) -> Update:
    noised = alphas.sqrt(), (1 - alphas).sqrt()
    return Update(noised, torch.ones_like(alphas), x, (), estimate, draws)
