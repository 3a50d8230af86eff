"""UniPC (Zhao et al., 2302.04867): a predictor and, with the next step's output, a corrector, of any order.

UniC-p is its algorithm 1, UniP-p algorithm 2; appendix A has both for predictions of x₀.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scumble_server.denoise.solvers.forms import Update, by_order, inputs
from scumble_server.denoise.solvers.levels import Levels, levels
from scumble_server.denoise.solvers.prediction import noise, original


def unipc(scheduler: Any, start: int, _eta: float) -> Update:
    """Return a step in diffusers' order: the sample is corrected with its own output, then the next one predicted."""
    config = scheduler.config
    by_level, index = levels(scheduler), torch.arange(start, len(scheduler.timesteps))
    given = inputs(len(index), config.solver_order, sample=True)
    here = by_level.at(index)
    asked = (config.prediction_type, here.alpha, here.sigma, given.x, given.m)
    x0 = original(*asked)
    newest = x0 if scheduler.predict_x0 else noise(*asked)
    solver = _Solver(by_level, scheduler.predict_x0, config.solver_type == "bh1")

    orders = _orders(scheduler, index - start)
    before = orders.roll(1)
    corrected = [
        solver.correct(given.sample, given.outputs, newest, index, order) for order in range(1, int(orders.max()) + 1)
    ]
    skipped = torch.tensor([step == start or step - 1 in scheduler.disable_corrector for step in index.tolist()])
    x = torch.where(skipped[:, None], given.x, by_order(before, corrected))

    outputs = (*given.outputs[1:], newest)
    predicted = [solver.predict(x, outputs, index, order) for order in range(1, int(orders.max()) + 1)]
    return Update(
        (here.alpha, here.sigma),
        torch.ones_like(here.sigma),
        by_order(orders, predicted),
        (*outputs, x),
        x0,
        torch.zeros_like(index, dtype=torch.bool),
    )


def _orders(scheduler: Any, taken: Tensor) -> Tensor:
    """Order of each step's predictor and of the corrector after it; `taken` counts the steps before it."""
    orders = (taken + 1).clamp(max=scheduler.config.solver_order)
    return torch.minimum(orders, len(taken) - taken) if scheduler.config.lower_order_final else orders


@dataclass(frozen=True, slots=True)
class _Solver:
    levels: Levels
    predicts_x0: bool
    bh1: bool
    """B(h) is h, else e^h − 1."""

    def predict(self, x: Tensor, outputs: tuple[Tensor, ...], index: Tensor, order: int) -> Tensor:
        """UniP-`order`: the sample after step `index`, from x and the newest `outputs`, whose last is the step's."""
        stride = _Stride.of(self, index, order)
        differences = stride.differences(outputs)
        if order == 1:
            weights = []
        elif order == 2:  # as in the paper's code: no system of equations for one unknown
            weights = [0.5 * torch.ones_like(stride.hh)]
        else:
            weights = _solve(stride.powers()[:, :-1, :-1], stride.moments()[:, :-1])
        return stride.integrate(x, outputs[-1], weights, differences)

    def correct(self, x: Tensor, outputs: tuple[Tensor, ...], newest: Tensor, index: Tensor, order: int) -> Tensor:
        """UniC-`order`: the sample of step `index` again, from the one before (x), with this step's output `newest`."""
        stride = _Stride.of(self, index - 1, order)
        differences = [*stride.differences(outputs), newest - outputs[-1]]
        weights = [0.5 * torch.ones_like(stride.hh)] if order == 1 else _solve(stride.powers(), stride.moments())
        return stride.integrate(x, outputs[-1], weights, differences)


@dataclass(frozen=True, slots=True)
class _Stride:
    """The way from one level to the next one, for each step, and what a solver of `order` weighs on it."""

    solver: _Solver
    s: Levels
    t: Levels
    hh: Tensor
    """±h, h = λ_t − λ_s, `(steps, 1)`; negative where x₀ is predicted."""
    ratios: list[Tensor]
    """r_k of the `order` − 1 levels before, `(steps, 1)` each."""

    @classmethod
    def of(cls, solver: _Solver, index: Tensor, order: int) -> _Stride:
        s, t = solver.levels.at(index), solver.levels.at(index + 1)
        h = t.lam - s.lam
        ratios = [(solver.levels.at(index - k).lam - s.lam) / h for k in range(1, order)]
        return cls(solver, s, t, -h if solver.predicts_x0 else h, ratios)

    def differences(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """D_k / r_k: how earlier outputs differ from the newest."""
        return [(outputs[-1 - k] - outputs[-1]) / ratio for k, ratio in enumerate(self.ratios, start=1)]

    def b(self) -> Tensor:
        """B(h), `(steps, 1)`."""
        return self.hh if self.solver.bh1 else torch.expm1(self.hh)

    def powers(self) -> Tensor:
        """R, `(steps, order, order)`: row i has r_k^i, with r = 1 for this step's own output at last."""
        ratios = torch.cat([*self.ratios, torch.ones_like(self.hh)], dim=1)
        return torch.stack([ratios**i for i in range(ratios.shape[1])], dim=1)

    def moments(self) -> Tensor:
        """The right side, `(steps, order)`: hⁱ·φᵢ₊₁(h)·i! / B(h) without its powers of h, φ₁(h) = (eʰ − 1)/h."""
        phi, factorial, moments = torch.expm1(self.hh) / self.hh - 1, 1, []
        for i in range(1, len(self.ratios) + 2):
            moments.append(phi * factorial / self.b())
            factorial *= i + 1
            phi = phi / self.hh - 1 / factorial
        return torch.cat(moments, dim=1)

    def integrate(self, x: Tensor, m0: Tensor, weights: list[Tensor], differences: list[Tensor]) -> Tensor:
        """The exact integral of x and m0 over the way, and what the other outputs add to it."""
        residual = torch.zeros_like(x)
        for weight, difference in zip(weights, differences, strict=True):
            residual = residual + weight * difference
        s, t = self.s, self.t
        ratio, factor = (t.sigma / s.sigma, t.alpha) if self.solver.predicts_x0 else (t.alpha / s.alpha, t.sigma)
        return ratio * x - factor * torch.expm1(self.hh) * m0 - factor * self.b() * residual


def _solve(left: Tensor, right: Tensor) -> list[Tensor]:
    """Solve each step's system; columns `(steps, 1)` of the solution, not a number where there is none."""
    solved, info = torch.linalg.solve_ex(left, right)
    return list(torch.where(info[:, None] == 0, solved, torch.nan).split(1, dim=1))
