"""Noise levels of a schedule as solvers in λ take them: amplitudes α and σ, and λ = log(α/σ), half the log-SNR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Levels:
    """A column `(levels, 1)` of each, in float64."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    def at(self, index: Tensor) -> Levels:
        """Those at `index`, `(steps,)`; negative ones count from the end, and are for steps that do not use them."""
        return Levels(self.alpha[index], self.sigma[index], self.lam[index])


def levels(scheduler: Any) -> Levels:
    """Return a level for each of the scheduler's sigmas, the last one of which is only arrived at."""
    sigma = scheduler.sigmas.double()[:, None]
    if scheduler.config.use_flow_sigmas:
        alpha, amplitude = 1 - sigma, sigma
    else:
        alpha = 1 / (sigma**2 + 1).sqrt()
        amplitude = sigma * alpha
    return Levels(alpha, amplitude, alpha.log() - amplitude.log())
