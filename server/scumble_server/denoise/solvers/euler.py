"""Euler's method on sigmas.

Euler is algorithm 1 of Karras et al. (2206.00364) without its correction of second order. Euler ancestral is the
ancestral sampling of Ho et al. (2006.11239) on the same sigmas, as in k-diffusion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scumble_server.denoise.solvers.forms import Inputs, Update, inputs


def euler(scheduler: Any, start: int, _eta: float) -> Update:
    """Return Euler's step from sigma to the next one."""
    sigma, to, given = _begin(scheduler, start)
    x0 = _original(scheduler, sigma, given)
    x = given.x + (given.x - x0) / sigma * (to - sigma)
    return _update(sigma, x, x0, draws=False)


def euler_ancestral(scheduler: Any, start: int, _eta: float) -> Update:
    """Return a step down to σ_down and noise up to the next sigma: σ_up² + σ_down² = σ_to²."""
    if scheduler.config.prediction_type == "sample":
        raise NotImplementedError
    sigma, to, given = _begin(scheduler, start)
    x0 = _original(scheduler, sigma, given)
    up = (to**2 * (sigma**2 - to**2) / sigma**2).sqrt()
    x = given.x + (given.x - x0) / sigma * (to**2 / sigma - sigma) + up * given.n
    return _update(sigma, x, x0, draws=True)


def _begin(scheduler: Any, start: int) -> tuple[Tensor, Tensor, Inputs]:
    """Sigma and the next one, `(steps, 1)` each, and the forms."""
    steps = len(scheduler.timesteps)  # there may be more sigmas
    sigmas = scheduler.sigmas.double()[start : steps + 1, None]
    return sigmas[:-1], sigmas[1:], inputs(steps - start)


def _original(scheduler: Any, sigma: Tensor, given: Inputs) -> Tensor:
    """x̂₀ of a sample x = x₀ + σε."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return given.x - sigma * given.m
        case "v_prediction":
            return given.x / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * given.m
    return given.m


def _update(sigma: Tensor, x: Tensor, x0: Tensor, *, draws: bool) -> Update:
    noised = torch.ones_like(sigma), sigma
    return Update(noised, 1 / (sigma**2 + 1).sqrt(), x, (), x0, torch.full((len(sigma),), draws))
