"""Schedulers as tables of coefficients, computed ahead for all steps, so that one update serves every row.

Every scheduler served here is linear in the sample x, the model's output m, what it remembers h₁ … h₃ (earlier
predictions, an earlier sample) and fresh noise n. Step i of a row is then, whatever its scheduler:

    model input    xᵢₙ = c_in[i]·x                          at timestep[i]
    everything     [x′, h′₁, h′₂, h′₃, x̂₀] = matrix[i] · [x, h₁, h₂, h₃, m, n]

x′ is the next sample, h′ what is remembered, x̂₀ the finished sample as far as this step can tell. What is not used is
zero. `solvers/` has the formulas; the tests compare them with what diffusers' own `step` makes of the basis vectors.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from scumble.errors import InvalidRequest
from scumble_server.denoise.solvers.dpm import multistep, singlestep
from scumble_server.denoise.solvers.euler import euler, euler_ancestral
from scumble_server.denoise.solvers.forms import Formula, Update
from scumble_server.denoise.solvers.prediction import PREDICTIONS
from scumble_server.denoise.solvers.timesteps import ddim, lcm, tcd
from scumble_server.denoise.solvers.unipc import unipc

HISTORY = 3
"""Latents that a row remembers beside its sample: what UniPC of order 2 needs, more than any other."""

_ODE, _SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
# Class, what the name adds to the base's config, formula: diffusers' own table of the webui's names. "DPM++ SDE" is
# there the single-step solver, which draws noise only if its algorithm is the stochastic one.
KINDS: dict[str, tuple[type[Any], dict[str, Any], Formula]] = {
    "ddim": (DDIMScheduler, {}, ddim),
    "euler": (EulerDiscreteScheduler, {}, euler),
    "euler_a": (EulerAncestralDiscreteScheduler, {}, euler_ancestral),
    "dpmpp_2m": (DPMSolverMultistepScheduler, _ODE, multistep),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, _ODE | _KARRAS, multistep),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, _SDE, multistep),
    "dpmpp_2m_sde_karras": (DPMSolverMultistepScheduler, _SDE | _KARRAS, multistep),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, _SDE, singlestep),
    "dpmpp_sde_karras": (DPMSolverSinglestepScheduler, _SDE | _KARRAS, singlestep),
    "unipc": (UniPCMultistepScheduler, {}, unipc),
    "lcm": (LCMScheduler, {}, lcm),
    "tcd": (TCDScheduler, {}, tcd),
}
# The first two make a step depend on the values of the sample, which no table of coefficients can say; the last one is
# another scheduler for UniPC's predictor.
_NOT_SERVED = ("clip_sample", "thresholding", "solver_p")


@dataclass(frozen=True, slots=True)
class Table:
    """One schedule, or the end of one. Tensors are float32 on the CPU.

    `init_sigma` scales the initial noise.
    """

    init_sigma: float
    noised: Tensor
    """`(steps + 1, 2)`: factors of (original, noise) in a picture as noisy as a step expects it, at last (1, 0)."""
    timestep: Tensor
    """`(steps,)`"""
    c_in: Tensor
    """`(steps,)`"""
    matrix: Tensor
    """`(steps, 2 + HISTORY, 3 + HISTORY)`"""
    draws: tuple[bool, ...]
    """True for each step in which diffusers draws noise, even if it does not use it."""

    @property
    def steps(self) -> int:
        return len(self.timestep)


def table(
    name: str,
    config: Mapping[str, Any],
    steps: int,
    *,
    start: int = 0,
    timestep_spacing: str | None = None,
    rescale_betas: bool | None = None,
    eta: float | None = None,
) -> Table:
    """The table of scheduler `name` for a base's scheduler `config`, from step `start` of `steps` on.

    None means what the config says; of `eta`, 0, as in diffusers' pipelines. Raises InvalidRequest if there is none.
    """
    if name not in KINDS:
        raise InvalidRequest(f"unknown scheduler {name!r}; known are {sorted(KINDS)}", field="scheduler")
    kind = KINDS[name][0]
    _check_option(name, kind, timestep_spacing, "timestep_spacing", "timestep_spacing")
    _check_option(name, kind, rescale_betas, "rescale_betas", "rescale_betas_zero_snr")
    _check_option(name, kind.step, eta, "eta", "eta")
    if start >= steps:
        raise InvalidRequest(f"of {steps} steps none is left at {start}; ask for more of them", field="steps")
    changes = {"timestep_spacing": timestep_spacing, "rescale_betas_zero_snr": rescale_betas}
    changes = {key: value for key, value in changes.items() if value is not None}
    # `_use_default_values` stays in: diffusers gives another scheduler class its own defaults for those.
    tabled = _table(name, json.dumps(dict(config), default=sorted), json.dumps(changes), steps, start, eta or 0.0)
    if isinstance(tabled, _Refusal):
        raise InvalidRequest(tabled.message, field=tabled.field)
    return tabled


def first_step(steps: int, strength: float) -> int:
    """Return the first step of an img2img schedule of `steps` at `strength` (0 to 1), as diffusers' `get_timesteps`."""
    return max(steps - min(int(steps * strength), steps), 0)


def _check_option(name: str, takes: Callable[..., Any], value: object, option: str, parameter: str) -> None:
    if value is not None and parameter not in inspect.signature(takes).parameters:
        raise InvalidRequest(f"scheduler {name} has no {option}; leave it out", field=f"options.{option}")


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why there is no table. It is remembered like one, so that asking again costs nothing."""

    message: str
    field: str


@lru_cache(maxsize=1024)
def _table(name: str, config_json: str, changes_json: str, steps: int, start: int, eta: float) -> Table | _Refusal:
    try:
        return _tabled(name, _make(name, json.loads(config_json), json.loads(changes_json)), steps, start, eta)
    except InvalidRequest as error:
        return _Refusal(error.message, error.fields["field"])


def _tabled(name: str, scheduler: Any, steps: int, start: int, eta: float) -> Table:
    limit = scheduler.config.num_train_timesteps
    if steps > limit:
        raise InvalidRequest(f"steps is {steps}, this base has only {limit} timesteps", field="steps")
    try:
        _set_timesteps(scheduler, steps)
        _check_memory(min(scheduler.config.get("solver_order", 1), steps - start) - 1)
        return _assemble(scheduler, KINDS[name][2](scheduler, start, eta), start)
    except NotImplementedError as error:
        predicts = scheduler.config.prediction_type
        raise InvalidRequest(f"scheduler {name} cannot draw with a model of {predicts}", field="scheduler") from error
    except (IndexError, ValueError) as error:  # of diffusers, which cannot do it either, or of ours
        raise InvalidRequest(
            f"scheduler {name} cannot do {steps} steps on this base: {error}", field="steps"
        ) from error


def _make(name: str, config: dict[str, Any], changes: dict[str, Any]) -> Any:
    """diffusers' scheduler. Raises InvalidRequest if it cannot do what the base asks for, or no table can say it."""
    kind, named, _ = KINDS[name]
    order = config.get("solver_order", 1)
    if not isinstance(order, int) or order < 1:
        raise InvalidRequest(f"the base's scheduler says solver_order {order!r}; it is 1 or more", field="scheduler")
    try:
        scheduler = kind.from_config(config, **named, **changes)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise InvalidRequest(f"scheduler {name} cannot serve this base: {error}", field="scheduler") from error
    for option in _NOT_SERVED:
        if scheduler.config.get(option):
            raise InvalidRequest(f"the base's scheduler asks for {option}, which is not served", field="scheduler")
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise InvalidRequest(
            f"the base's scheduler says prediction_type {scheduler.config.prediction_type!r}; "
            f"{', '.join(PREDICTIONS)} can be served",
            field="scheduler",
        )
    return scheduler


def _set_timesteps(scheduler: Any, steps: int) -> None:
    """Raises ValueError if diffusers cannot make just so many of them."""
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) != steps:
        raise ValueError(
            f"the spacing of its timesteps gives {len(scheduler.timesteps)} of them; ask for another number"
        )


def _check_memory(needed: int) -> None:
    """Raises ValueError for more earlier latents than a row remembers."""
    if needed > HISTORY:
        raise ValueError(f"its solver_order needs {needed} earlier latents, and at most {HISTORY} are kept")


def _assemble(scheduler: Any, update: Update, start: int) -> Table:
    """Raises ValueError for coefficients that are not finite, and for more memory than a row has."""
    matrices = torch.stack([update.x, *update.memory, update.estimate], dim=1)
    if not matrices.isfinite().all():
        raise ValueError("some of its coefficients are not finite")
    picture = torch.tensor([[1.0, 0.0]])
    return Table(
        float(scheduler.init_noise_sigma),
        torch.cat([torch.cat(update.noised, dim=1).float(), picture]),
        scheduler.timesteps[start:].float().clone(),
        update.c_in[:, 0].float(),
        _only_used(matrices).float(),
        tuple(update.draws.tolist()),
    )


def _only_used(matrices: Tensor) -> Tensor:
    """`(steps, 2 + places, 3 + places)` → `(steps, 2 + HISTORY, 3 + HISTORY)`: only what a later step reads is kept.

    Raises ValueError if that is more than a row remembers.
    """
    places = matrices.shape[1] - 2
    used = [place for place in range(1, 1 + places) if matrices[:, :, place].any()]
    _check_memory(len(used))
    reduced = matrices.new_zeros(len(matrices), 2 + HISTORY, 3 + HISTORY)
    there = [*range(1 + len(used))]
    rows, columns = [0, *used, places + 1], [0, *used, places + 1, places + 2]
    kept_rows, kept_columns = [*there, HISTORY + 1], [*there, HISTORY + 1, HISTORY + 2]
    reduced[:, torch.tensor(kept_rows)[:, None], torch.tensor(kept_columns)] = matrices[
        :, torch.tensor(rows)[:, None], torch.tensor(columns)
    ]
    return reduced
