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
from support.probed import Probed, probe
from support.scheduler_configs import configs

ERRORS = (IndexError, NotImplementedError)


def both(name: str, config: dict[str, Any], steps: int, start: int, eta: float) -> tuple[Update, Probed] | None:
    """Ours and diffusers'; None where neither can do it, for the same reason."""
    kind, named = SCHEDULERS[name]
    takes = inspect.signature(kind.__init__).parameters
    try:
        scheduler = kind.from_config({key: value for key, value in config.items() if key in takes}, **named)
        scheduler.set_timesteps(steps)
    except ValueError:
        return None
    start = min(start, len(scheduler.timesteps) - 1)
    try:
        probed = probe(scheduler, start, eta)
    except ERRORS as error:
        with pytest.raises(type(error)):
            KINDS[name][2](scheduler, start, eta)
        return None
    return KINDS[name][2](scheduler, start, eta), probed


def compare(ours: Update, expected: Probed) -> None:
    matrix = torch.stack([ours.x, *ours.memory, ours.estimate], dim=1)
    assert matrix.dtype == torch.float64
    assert tuple(ours.draws.tolist()) == expected.draws
    assert torch.allclose(torch.cat(ours.noised, dim=1), expected.noised, rtol=1e-6)
    assert torch.allclose(ours.c_in[:, 0], expected.c_in, rtol=1e-6)
    assert matrix.shape == expected.matrix.shape
    assert matrix.isfinite().all() == expected.matrix.isfinite().all()
    if matrix.isfinite().all():
        assert torch.allclose(matrix, expected.matrix, rtol=1e-5, atol=1e-5)


@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    config=configs(),
    steps=st.integers(1, 40),
    start=st.integers(0, 39),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=1500, deadline=None)
def test_equal_to_diffusers(name: str, config: dict[str, Any], steps: int, start: int, eta: float) -> None:
    if compared := both(name, config, steps, start, eta):
        compare(*compared)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [200, 998, 999])
def test_equal_to_diffusers_in_many_steps(name: str, steps: int) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    compared = both(name, {**config, "original_inference_steps": 1000}, steps, 0, 0.3)
    assert compared is not None
    compare(*compared)
