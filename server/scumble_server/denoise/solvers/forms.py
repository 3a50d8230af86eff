"""Linear forms, in which a solver's formulas are written as in its paper and yield the coefficients of every step.

A form is a tensor `(steps, 3 + places)`: for each step, the coefficients of (x, h₁ … h_places, m, n), that is of the
sample, of what earlier steps left in the places of memory, of the model's output and of fresh noise. Forms are added to
each other and multiplied by numbers `(steps, 1)`. All is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the update of each step may use, as forms."""

    x: Tensor
    outputs: tuple[Tensor, ...]
    """Earlier predictions, the newest last; zero where there were not yet so many."""
    sample: Tensor
    """An earlier sample; zero in the first step, and if no place is kept for it."""
    m: Tensor
    n: Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """What a scheduler does in each of its steps, with as many places of memory as diffusers' class has."""

    noised: tuple[Tensor, Tensor]
    """`(steps, 1)` each: factors of original and noise in a picture as noisy as the step expects it."""
    c_in: Tensor
    """`(steps, 1)`: factor of x in the model's input."""
    x: Tensor
    """Form of the next sample."""
    memory: tuple[Tensor, ...]
    """Forms of what is remembered, in the order of the places."""
    estimate: Tensor
    """Form of the finished sample as far as the step can tell."""
    draws: Tensor
    """`(steps,)`, bool: whether diffusers draws noise."""


Formula = Callable[[Any, int, float], Update]
"""diffusers' scheduler after `set_timesteps`, first step, eta → Update.

Raises IndexError for a timestep that the schedule does not have, NotImplementedError for a prediction that the
scheduler does not know.
"""


def inputs(steps: int, outputs: int = 0, *, sample: bool = False) -> Inputs:
    """Forms for `steps` steps with places for `outputs` earlier predictions and, if asked for, a sample after them."""
    basis = torch.eye(3 + outputs + sample, dtype=torch.float64)[:, None].expand(-1, steps, -1)
    taken = torch.arange(steps)[:, None]
    return Inputs(
        basis[0],
        tuple(torch.where(taken >= outputs - place, basis[1 + place], 0.0) for place in range(outputs)),
        torch.where(taken >= 1, basis[1 + outputs], 0.0) if sample else torch.zeros_like(basis[0]),
        basis[-2],
        basis[-1],
    )


def by_order(orders: Tensor, forms: Sequence[Tensor]) -> Tensor:
    """Choose for each step `forms[order - 1]`; `orders` is `(steps,)`."""
    chosen = forms[0]
    for order, form in enumerate(forms[1:], start=2):
        chosen = torch.where(orders[:, None] == order, form, chosen)
    return chosen
