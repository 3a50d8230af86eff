"""Every formula gives the coefficients of diffusers' own `step`, matrix for matrix, whatever a config asks for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble_server.denoise.schedulers import KINDS
from scumble_server.denoise.solvers.forms import Update
from support.oracle import SCHEDULERS
from support.probed import probe
from support.scheduler_configs import configs
from support.searching import examples


def scheduler_of(name: str, config: dict[str, Any], steps: int) -> Any:
    """Raises ValueError for what diffusers cannot do; what the class does not take is left out of `config`."""
    kind, named = SCHEDULERS[name]
    takes = inspect.signature(kind.__init__).parameters
    scheduler = kind.from_config({key: value for key, value in config.items() if key in takes}, **named)
    scheduler.set_timesteps(steps)
    return scheduler


def compare(name: str, config: dict[str, Any], steps: int, start: int, eta: float) -> bool:
    """Ours with diffusers'; False if neither can do it, for the same reason."""
    try:
        scheduler = scheduler_of(name, config, steps)
    except ValueError:
        return False
    start = min(start, len(scheduler.timesteps) - 1)
    formula = KINDS[name][2]
    try:
        exact = probe(scheduler_of(name, config, steps), start, eta, exact=True)
        rounded = probe(scheduler_of(name, config, steps), start, eta, exact=False)
    except (IndexError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            formula(scheduler, start, eta)
        return False
    except torch.linalg.LinAlgError:
        assert not matrix_of(formula(scheduler, start, eta)).isfinite().all()
        return False
    ours = formula(scheduler, start, eta)
    assert tuple(ours.draws.tolist()) == exact.draws
    assert torch.allclose(torch.cat(ours.noised, dim=1), exact.noised, rtol=1e-6, equal_nan=True)
    assert torch.allclose(ours.c_in[:, 0], exact.c_in, rtol=1e-6)
    matrix = matrix_of(ours)
    if exact.matrix.isfinite().all():
        assert torch.allclose(matrix, exact.matrix, rtol=1e-5, atol=1e-5)
    elif rounded.matrix.isfinite().all():
        assert torch.allclose(matrix, rounded.matrix, rtol=1e-3, atol=1e-3)
    elif matrix.isfinite().all():
        ratio = scheduler.sigmas[1:] / scheduler.sigmas[:-1]
        assert ((ratio > 1) & (ratio < 1 + 1e-6)).any(), "only a last bit was in diffusers' way"
    return bool(matrix.isfinite().all())


def matrix_of(update: Update) -> torch.Tensor:
    matrix = torch.stack([update.x, *update.memory, update.estimate], dim=1)
    assert matrix.dtype == torch.float64
    return matrix


@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    config=configs(),
    steps=st.integers(1, 40),
    start=st.integers(0, 39),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=examples(300), deadline=None)
def test_equal_to_diffusers(name: str, config: dict[str, Any], steps: int, start: int, eta: float) -> None:
    compare(name, config, steps, start, eta)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [200, 999])
def test_equal_to_diffusers_in_many_steps(name: str, steps: int) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    assert compare(name, {**config, "original_inference_steps": 1000}, steps, 0, 0.3)
