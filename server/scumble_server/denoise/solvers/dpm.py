"""DPM-Solver++ (Lu et al., 2211.01095): its multistep and single-step solvers of order 1 to 3, as ODE and as SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scumble_server.denoise.solvers.forms import Inputs, Update, by_order, inputs
from scumble_server.denoise.solvers.levels import Levels, levels
from scumble_server.denoise.solvers.prediction import original

_FEW = 15
"""Below so many steps `lower_order_final` has an effect on the multistep solver."""
_SAME = 1e-6
"""Levels as near as this are equal for diffusers, whose last bit may say that noise comes back."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps `index` of a schedule, on which both solvers build."""

    scheduler: Any
    levels: Levels
    index: Tensor
    given: Inputs
    outputs: tuple[Tensor, ...]
    """Predictions of x₀, this step's last."""

    @property
    def stochastic(self) -> bool:
        return bool(self.scheduler.config.algorithm_type == "sde-dpmsolver++")

    @property
    def midpoint(self) -> bool:
        return bool(self.scheduler.config.solver_type == "midpoint")

    def level(self, offset: int) -> Levels:
        return self.levels.at(self.index + offset)

    def lam(self, offset: int) -> Tensor:
        return self.level(offset).lam

    def update(self, x: Tensor, memory: tuple[Tensor, ...]) -> Update:
        here = self.level(0)
        draws = torch.full_like(self.index, self.stochastic, dtype=torch.bool)
        ones = torch.ones_like(here.sigma)
        return Update((here.alpha, here.sigma), ones, x, memory, self.outputs[-1], draws)

    def advance(
        self, sample: Tensor, base: int, d0: Tensor, d1: Tensor | None = None, d2: Tensor | None = None
    ) -> Tensor:
        """Integrate from the level of step `base` (0 or earlier) to the next one, by x₀'s derivatives in λ there.

        d1 without d2 is of second order by the solver's type. φ = 1 − e^−h; for the SDE h is twice as long, and noise
        makes up for what is lost of the variance.
        """
        s, t = self.level(base), self.level(1)
        h = (t.lam - s.lam) * (2 if self.stochastic else 1)
        phi = -torch.expm1(-h)
        decay = torch.exp(-h / 2) if self.stochastic else 1.0
        x = t.sigma / s.sigma * decay * sample + t.alpha * phi * d0
        if self.stochastic:
            variance = torch.where(phi.abs() < _SAME, phi.clamp(min=0), phi)
            x = x + t.sigma * variance.sqrt() * self.given.n
        if d1 is not None:
            x = x + t.alpha * (phi / 2 if self.midpoint and d2 is None else 1 - phi / h) * d1
        if d2 is not None:
            # diffusers subtracts the half in its SDE, where the ODE's expansion adds it.
            x = x + t.alpha * ((phi - h) / h**2 + (-0.5 if self.stochastic else 0.5)) * d2
        return x


def multistep(scheduler: Any, start: int, _eta: float) -> Update:
    """Return the multistep solver (algorithm 2 for order 2), of the order that config and end of the schedule allow."""
    run = _begin(scheduler, start, sample=False)
    orders = _multistep_orders(scheduler, run.index - start)
    m0, m1, m2 = _newest(run)
    x = run.given.x
    forms = [run.advance(x, 0, m0)]
    if orders.max() >= 2:
        h, h0 = run.lam(1) - run.lam(0), run.lam(0) - run.lam(-1)
        r0 = h0 / h
        slope = (m0 - m1) / r0
        forms.append(run.advance(x, 0, m0, slope))
    if orders.max() >= 3:
        r1 = (run.lam(-1) - run.lam(-2)) / h
        before = (m1 - m2) / r1
        d1, d2 = slope + r0 / (r0 + r1) * (slope - before), (slope - before) / (r0 + r1)
        forms.append(run.advance(x, 0, m0, d1, d2))
    return run.update(by_order(orders, forms), run.outputs)


def singlestep(scheduler: Any, start: int, _eta: float) -> Update:
    """Return the single-step solver (algorithm 1 for order 2), whose stages are diffusers' steps of order 1, 2, (3), …

    A later stage goes again from the sample with which its first one began.
    """
    run = _begin(scheduler, start, sample=True)
    orders = torch.minimum(torch.tensor(scheduler.order_list)[run.index], run.index - start + 1)
    sample = torch.where(orders[:, None] == 1, run.given.x, run.given.sample)
    m0, m1, m2 = _newest(run)
    forms = [run.advance(sample, 0, m0)]
    if orders.max() >= 2:
        r0 = (run.lam(0) - run.lam(-1)) / (run.lam(1) - run.lam(-1))
        forms.append(run.advance(sample, -1, m1, (m0 - m1) / r0))
    if orders.max() >= 3:
        h = run.lam(1) - run.lam(-2)
        r0, r1 = (run.lam(0) - run.lam(-2)) / h, (run.lam(-1) - run.lam(-2)) / h
        near, far = (m1 - m2) / r1, (m0 - m2) / r0
        d1, d2 = (r0 * near - r1 * far) / (r0 - r1), 2 * (far - near) / (r0 - r1)
        d1, d2 = (far, torch.zeros_like(d2)) if run.midpoint else (d1, d2)
        forms.append(run.advance(sample, -2, m2, d1, d2))
    return run.update(by_order(orders, forms), (*run.outputs, sample))


def _begin(scheduler: Any, start: int, *, sample: bool) -> _Run:
    index = torch.arange(start, len(scheduler.timesteps))
    given = inputs(len(index), scheduler.config.solver_order, sample=sample)
    by_level = levels(scheduler)
    here = by_level.at(index)
    x0 = original(scheduler.config.prediction_type, here.alpha, here.sigma, given.x, given.m)
    return _Run(scheduler, by_level, index, given, (*given.outputs[1:], x0))


def _newest(run: _Run) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of this step and of the two before; zeros for those that the order does not reach."""
    nothing = torch.zeros_like(run.given.x)
    m2, m1, m0 = (nothing, nothing, *run.outputs)[-3:]
    return m0, m1, m2


def _multistep_orders(scheduler: Any, taken: Tensor) -> Tensor:
    """Order of each step; `taken` counts those before it."""
    config, last = scheduler.config, len(taken) - 1
    few = config.lower_order_final and len(scheduler.timesteps) < _FEW
    orders = (taken + 1).clamp(max=min(config.solver_order, 3))
    if few:
        orders = torch.where(taken == last - 1, orders.clamp(max=2), orders)
    if few or config.euler_at_final or config.final_sigmas_type == "zero":
        orders = torch.where(taken == last, 1, orders)
    return orders
