"""The coefficients of diffusers' own `step`, found by running it once for each step on the basis vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode

KEPT_SAMPLES = ("last_sample", "sample")
"""Where schedulers keep a sample beside their `model_outputs`: UniPC, the single-step solver."""


@dataclass(frozen=True, slots=True)
class Probed:
    noised: Tensor
    """`(steps, 2)`: factors of original and noise."""
    c_in: Tensor
    """`(steps,)`"""
    matrix: Tensor
    """`(steps, 2 + places, 3 + places)`: (x, h…, m, n) → (x′, h′…, x̂₀), with every place that the class has."""
    draws: tuple[bool, ...]


def probe(scheduler: Any, start: int, eta: float, *, exact: bool) -> Probed:
    """Run all steps from `start` on, after `set_timesteps`. Raises what diffusers raises.

    If `exact`, sigmas are float64, so that steps round less; the schedulers without any (DDIM, LCM, TCD) stay as they
    are.
    """
    if exact and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    picture, noise = torch.eye(2, dtype=torch.float64)
    noised, probed = [], []
    for i, timestep in enumerate(timesteps):
        noised.append(scheduler.add_noise(picture, noise, timesteps[i : i + 1]))
        probed.append(_probe_step(scheduler, timestep, eta))
    c_in, matrices, draws = zip(*probed, strict=True)
    return Probed(torch.stack(noised), torch.tensor(c_in, dtype=torch.float64), torch.stack(matrices), draws)


def _probe_step(scheduler: Any, timestep: Tensor, eta: float) -> tuple[float, Tensor, bool]:
    """c_in, matrix and whether noise was drawn."""
    places = len(_memory(scheduler))
    basis = torch.eye(3 + places, dtype=torch.float64)[..., None]  # some steps want (batch, channels)
    x, m, n = basis[0], basis[-2], basis[-1]
    _remember(scheduler, list(basis[1 : 1 + places]))
    c_in = scheduler.scale_model_input(x, timestep)[0].item()
    takes_eta = "eta" in inspect.signature(scheduler.step).parameters
    estimate = _original_of_unipc(scheduler, timestep, m, x)
    with _Given(n) as given:
        stepped = scheduler.step(m, timestep, x, **({"eta": eta} if takes_eta else {}))
    nothing = torch.zeros_like(x)
    remembered = [nothing if vector is None else vector for vector in _memory(scheduler)]
    if estimate is None:
        estimate = _estimate(scheduler, stepped, m, timestep, x)
    outputs = [stepped.prev_sample, *remembered, estimate]
    return c_in, torch.stack([output.double().flatten() for output in outputs]), given.drawn


def _memory(scheduler: Any) -> list[Tensor | None]:
    """What a scheduler remembers from step to step; None for what is still empty."""
    samples = [getattr(scheduler, name) for name in KEPT_SAMPLES if hasattr(scheduler, name)]
    return [*getattr(scheduler, "model_outputs", ()), *samples]


def _remember(scheduler: Any, vectors: Sequence[Tensor]) -> None:
    """Put `vectors` where the scheduler remembers something, in the order of `_memory`."""
    rest = list(vectors)
    outputs = getattr(scheduler, "model_outputs", [])
    for i, output in enumerate(outputs):
        vector = rest.pop(0)
        outputs[i] = None if output is None else vector
    for name in KEPT_SAMPLES:
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
    ddim = DDIMScheduler(clip_sample=False, prediction_type=scheduler.config.prediction_type)
    ddim.alphas_cumprod = scheduler.alphas_cumprod  # a config leaves out what the other class has other defaults for
    ddim.set_timesteps(scheduler.num_inference_steps)
    return torch.as_tensor(ddim.step(m, timestep, x).pred_original_sample)


def _original_of_unipc(scheduler: Any, timestep: Tensor, m: Tensor, x: Tensor) -> Tensor | None:
    """UniPC remembers what it predicts, which may be the noise; it can convert to either. None for the others."""
    if not isinstance(scheduler, UniPCMultistepScheduler):
        return None
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    usual, scheduler.predict_x0 = scheduler.predict_x0, True
    converted = scheduler.convert_model_output(m, sample=x)
    scheduler.predict_x0 = usual
    return torch.as_tensor(converted)


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
