"""Schedulers as tables of coefficients, computed ahead with diffusers, so that one update serves every row.

Every scheduler served here is linear in the sample x, the model's output m and a history h of one earlier
prediction. Step i of a row is then, whatever its scheduler:

    model input   xᵢₙ = c_in[i]·x           at timestep[i]
    next sample   x'  = x·a[i] + m·b[i] + h·c[i]
    next history  h'  = x·p[i] + m·q[i]
    estimate      x0  = x·u[i] + m·v[i]     the finished sample, as far as this step can tell

The numbers are not derived here a second time: diffusers' own `step` is run once on the basis vectors of
(x, m, h), and what comes out are the coefficients. DDIM (Song et al., 2010.02502), Euler (Karras et al.,
2206.00364, algorithm 2 without churn), DPM-Solver++ 2M (Lu et al., 2211.01095).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from scumble.errors import InvalidRequest

_CLASSES = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
# These make a step depend on the values of the sample, which no table of coefficients can say.
_NOT_LINEAR = ("clip_sample", "thresholding")


@dataclass(frozen=True, slots=True)
class Table:
    """One schedule. All tensors are `(steps,)` float32 on the CPU; `init_sigma` scales the initial noise."""

    init_sigma: float
    timestep: Tensor
    c_in: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    p: Tensor
    q: Tensor
    u: Tensor
    v: Tensor

    @property
    def steps(self) -> int:
        return len(self.timestep)


def table(name: str, config: Mapping[str, Any], steps: int) -> Table:
    """The table of scheduler `name` for a base's scheduler `config`. Raises InvalidRequest if it has none."""
    if name not in _CLASSES:
        raise InvalidRequest(f"unknown scheduler {name!r}; known are {sorted(_CLASSES)}", field="scheduler")
    # `_use_default_values` stays in: diffusers gives another scheduler class its own defaults for those.
    return _table(name, json.dumps(dict(config), default=sorted), steps)


@lru_cache(maxsize=1024)
def _table(name: str, config_json: str, steps: int) -> Table:
    scheduler = _CLASSES[name].from_config(json.loads(config_json))
    for option in _NOT_LINEAR:
        if scheduler.config.get(option):
            raise InvalidRequest(f"the base's scheduler asks for {option}, which is not served", field="scheduler")
    limit = scheduler.config.num_train_timesteps
    if steps > limit:
        raise InvalidRequest(f"steps is {steps}, this base has only {limit} timesteps", field="steps")
    scheduler.set_timesteps(steps)
    try:
        rows = [_probe(scheduler, timestep) for timestep in scheduler.timesteps]
    except IndexError as error:  # with an offset the last of very many steps lies outside, for diffusers too
        raise InvalidRequest(
            f"scheduler {name} cannot do {steps} steps on this base; ask for fewer", field="steps"
        ) from error
    columns = torch.tensor(rows, dtype=torch.float32).T.contiguous()
    return Table(float(scheduler.init_noise_sigma), scheduler.timesteps.float().clone(), *columns)


def _probe(scheduler: Any, timestep: Tensor) -> tuple[float, ...]:
    """(c_in, a, b, c, p, q, u, v) of one step: what diffusers makes of the basis vectors of (x, m, h)."""
    x, m, h = torch.eye(3, dtype=torch.float64)
    history = getattr(scheduler, "model_outputs", None)
    if history is not None and history[-1] is not None:
        history[-1] = h
    c_in = scheduler.scale_model_input(x, timestep)[0]
    stepped = scheduler.step(m, timestep, x)
    a, b, c = stepped.prev_sample
    # The multistep solver remembers what the others tell: its history is the estimate.
    p, q = history[-1][:2] if history is not None else (0.0, 0.0)
    u, v = history[-1][:2] if history is not None else stepped.pred_original_sample[:2]
    return tuple(float(value) for value in (c_in, a, b, c, p, q, u, v))
