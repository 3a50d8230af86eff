"""Schedulers as tables of coefficients, computed ahead with diffusers, so that one update serves every row.

Every scheduler served here is linear in the sample x, the model's output m, what it remembers h₁ … h₃ (earlier
predictions, an earlier sample) and fresh noise n. Step i of a row is then, whatever its scheduler:

    model input    xᵢₙ = c_in[i]·x                          at timestep[i]
    everything     [x′, h′₁, h′₂, h′₃, x̂₀] = matrix[i] · [x, h₁, h₂, h₃, m, n]

x′ is the next sample, h′ what is remembered, x̂₀ the finished sample as far as this step can tell. What is not used is
zero. The numbers are not derived here a second time: diffusers' own `step` is run once on the basis vectors, and what
comes out are the coefficients.

DDIM (Song et al., 2010.02502), Euler and Euler ancestral (Karras et al., 2206.00364), DPM-Solver++ (Lu et al.,
2211.01095), UniPC (Zhao et al., 2302.04867), LCM (Luo et al., 2310.04378), TCD (Zheng et al., 2402.19159).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
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
from torch.overrides import TorchFunctionMode

from scumble.errors import InvalidRequest

HISTORY = 3
"""Latents that a row remembers beside its sample: what UniPC of order 2 needs, more than any other."""

_ODE, _SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
# Class and what the name adds to the base's config: diffusers' own table of the webui's names. "DPM++ SDE" is there
# the single-step solver, which draws noise only if its algorithm is the stochastic one.
_KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, _ODE),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, _ODE | _KARRAS),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, _SDE),
    "dpmpp_2m_sde_karras": (DPMSolverMultistepScheduler, _SDE | _KARRAS),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, _SDE),
    "dpmpp_sde_karras": (DPMSolverSinglestepScheduler, _SDE | _KARRAS),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
# These make a step depend on the values of the sample, which no table of coefficients can say.
_NOT_LINEAR = ("clip_sample", "thresholding")
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Where schedulers keep a sample beside their `model_outputs`: UniPC, the single-step solver.
_KEPT_SAMPLES = ("last_sample", "sample")


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
    if name not in _KINDS:
        raise InvalidRequest(f"unknown scheduler {name!r}; known are {sorted(_KINDS)}", field="scheduler")
    kind = _KINDS[name][0]
    _check_option(name, kind, timestep_spacing, "timestep_spacing", "timestep_spacing")
    _check_option(name, kind, rescale_betas, "rescale_betas", "rescale_betas_zero_snr")
    _check_option(name, kind.step, eta, "eta", "eta")
    if start >= steps:
        raise InvalidRequest(f"of {steps} steps none is left at {start}; ask for more of them", field="steps")
    changes = {"timestep_spacing": timestep_spacing, "rescale_betas_zero_snr": rescale_betas}
    changes = {key: value for key, value in changes.items() if value is not None}
    # `_use_default_values` stays in: diffusers gives another scheduler class its own defaults for those.
    return _table(name, json.dumps(dict(config), default=sorted), json.dumps(changes), steps, start, eta or 0.0)


def first_step(steps: int, strength: float) -> int:
    """Return the first step of an img2img schedule of `steps` at `strength` (0 to 1), as diffusers' `get_timesteps`."""
    return max(steps - min(int(steps * strength), steps), 0)


def _check_option(name: str, takes: Callable[..., Any], value: object, option: str, parameter: str) -> None:
    if value is not None and parameter not in inspect.signature(takes).parameters:
        raise InvalidRequest(f"scheduler {name} has no {option}; leave it out", field=f"options.{option}")


@lru_cache(maxsize=1024)
def _table(name: str, config_json: str, changes_json: str, steps: int, start: int, eta: float) -> Table:
    scheduler = _make(name, json.loads(config_json), json.loads(changes_json))
    limit = scheduler.config.num_train_timesteps
    if steps > limit:
        raise InvalidRequest(f"steps is {steps}, this base has only {limit} timesteps", field="steps")
    try:
        return _probe_all(scheduler, steps, start, eta)
    except NotImplementedError as error:
        predicts = scheduler.config.prediction_type
        raise InvalidRequest(f"scheduler {name} cannot draw with a model of {predicts}", field="scheduler") from error
    except (IndexError, ValueError) as error:  # of diffusers, which cannot do it either, or of ours
        raise InvalidRequest(
            f"scheduler {name} cannot do {steps} steps on this base: {error}", field="steps"
        ) from error


def _make(name: str, config: dict[str, Any], changes: dict[str, Any]) -> Any:
    """diffusers' scheduler. Raises InvalidRequest if it cannot do what the base asks for, or no table can say it."""
    kind, named = _KINDS[name]
    try:
        scheduler = kind.from_config(config, **named, **changes)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise InvalidRequest(f"scheduler {name} cannot serve this base: {error}", field="scheduler") from error
    for option in _NOT_LINEAR:
        if scheduler.config.get(option):
            raise InvalidRequest(f"the base's scheduler asks for {option}, which is not served", field="scheduler")
    if scheduler.config.prediction_type not in _PREDICTIONS:
        raise InvalidRequest(
            f"the base's scheduler says prediction_type {scheduler.config.prediction_type!r}; "
            f"{', '.join(_PREDICTIONS)} can be served",
            field="scheduler",
        )
    return scheduler


def _probe_all(scheduler: Any, steps: int, start: int, eta: float) -> Table:
    """Raises IndexError, ValueError or NotImplementedError for what diffusers or a table cannot do."""
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) != steps:
        raise ValueError(
            f"the spacing of its timesteps gives {len(scheduler.timesteps)} of them; ask for another number"
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    picture, noise = torch.eye(2, dtype=torch.float64)
    noised, probed = [], []
    for i, timestep in enumerate(timesteps):
        noised.append(scheduler.add_noise(picture, noise, timesteps[i : i + 1]))
        probed.append(_probe(scheduler, timestep, eta))
    c_in, matrices, draws = zip(*probed, strict=True)
    matrix = _only_used(torch.stack(matrices))
    if not matrix.isfinite().all():
        raise ValueError("some of its coefficients are not finite")
    return Table(
        float(scheduler.init_noise_sigma),
        torch.stack([*noised, picture]).float(),
        timesteps.float().clone(),
        torch.tensor(c_in, dtype=torch.float32),
        matrix.float(),
        draws,
    )


def _probe(scheduler: Any, timestep: Tensor, eta: float) -> tuple[float, Tensor, bool]:
    """c_in, matrix and whether noise was drawn: what diffusers makes of the basis vectors of (x, h…, m, n).

    The matrix has a row and a column for every place in which this scheduler can remember something.
    """
    places = len(_memory(scheduler))
    basis = torch.eye(3 + places, dtype=torch.float64)[..., None]  # some steps want (batch, channels)
    x, m, n = basis[0], basis[-2], basis[-1]
    _remember(scheduler, list(basis[1 : 1 + places]))
    c_in = scheduler.scale_model_input(x, timestep)[0].item()
    with _Given(n) as given:
        stepped = scheduler.step(m, timestep, x, **({"eta": eta} if _takes_eta(scheduler) else {}))
    nothing = torch.zeros_like(x)
    remembered = [nothing if vector is None else vector for vector in _memory(scheduler)]
    outputs = [stepped.prev_sample, *remembered, _estimate(scheduler, stepped, m, timestep, x)]
    return c_in, torch.stack([output.double().flatten() for output in outputs]), given.drawn


def _takes_eta(scheduler: Any) -> bool:
    return "eta" in inspect.signature(scheduler.step).parameters


def _memory(scheduler: Any) -> list[Tensor | None]:
    """Return what a scheduler remembers from step to step; None for what is still empty."""
    samples = [getattr(scheduler, name) for name in _KEPT_SAMPLES if hasattr(scheduler, name)]
    return [*getattr(scheduler, "model_outputs", ()), *samples]


def _remember(scheduler: Any, vectors: Sequence[Tensor]) -> None:
    """Put `vectors` where the scheduler remembers something, in the order of `_memory`."""
    rest = list(vectors)
    outputs = getattr(scheduler, "model_outputs", [])
    for i, output in enumerate(outputs):
        vector = rest.pop(0)
        outputs[i] = None if output is None else vector
    for name in _KEPT_SAMPLES:
        if hasattr(scheduler, name):
            vector = rest.pop(0)
            setattr(scheduler, name, None if getattr(scheduler, name) is None else vector)


def _estimate(scheduler: Any, stepped: Any, m: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
    """The finished sample as this step sees it. Multistep solvers remember it; of TCD, DDIM knows it."""
    for name in ("pred_original_sample", "denoised"):
        if hasattr(stepped, name):
            return torch.as_tensor(getattr(stepped, name))
    if outputs := getattr(scheduler, "model_outputs", None):
        return torch.as_tensor(outputs[-1])
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(scheduler.num_inference_steps)
    return torch.as_tensor(ddim.step(m, timestep, x).pred_original_sample)


def _only_used(matrices: Tensor) -> Tensor:
    """`(steps, 2 + places, 3 + places)` → `(steps, 2 + HISTORY, 3 + HISTORY)`: only what a later step reads is kept.

    Raises ValueError if that is more than a row remembers.
    """
    places = matrices.shape[1] - 2
    used = [place for place in range(1, 1 + places) if matrices[:, :, place].any()]
    if len(used) > HISTORY:
        raise ValueError(f"its solver_order needs {len(used)} earlier latents, and at most {HISTORY} are kept")
    reduced = matrices.new_zeros(len(matrices), 2 + HISTORY, 3 + HISTORY)
    there = [*range(1 + len(used))]
    rows, columns = [0, *used, places + 1], [0, *used, places + 1, places + 2]
    kept_rows, kept_columns = [*there, HISTORY + 1], [*there, HISTORY + 1, HISTORY + 2]
    reduced[:, torch.tensor(kept_rows)[:, None], torch.tensor(kept_columns)] = matrices[
        :, torch.tensor(rows)[:, None], torch.tensor(columns)
    ]
    return reduced


class _Given(TorchFunctionMode):
    """In it `torch.randn` gives `noise`, in this thread, and `drawn` says whether it was asked for."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self._noise = noise
        self.drawn = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.randn:
            self.drawn = True
            return self._noise.to((kwargs or {}).get("dtype"))
        return function(*args, **(kwargs or {}))
