"""A table's update equals diffusers' own scheduler, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import InvalidRequest
from scumble_server.schedulers import table

CLASSES = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
# Both as written in stable-diffusion-v1-5's scheduler_config.json: what is left out, each class fills by itself.
SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


@given(
    name=st.sampled_from(sorted(CLASSES)),
    steps=st.integers(1, 60),
    config=st.sampled_from([SD15, dict(PNDMScheduler.from_config(SD15).config)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_diffusers(name: str, steps: int, config: dict[str, Any], seed: int) -> None:
    scheduler = CLASSES[name].from_config(config)
    scheduler.set_timesteps(steps)
    coefficients = table(name, config, steps)
    assert torch.equal(coefficients.timestep, scheduler.timesteps.float())
    expected = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    ours, history = expected.clone(), torch.zeros(64)
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(model(scheduler.scale_model_input(expected, timestep)), timestep, expected)[0]
        output = model(coefficients.c_in[i] * ours)
        ours, history = (
            coefficients.a[i] * ours + coefficients.b[i] * output + coefficients.c[i] * history,
            coefficients.p[i] * ours + coefficients.q[i] * output,
        )
    assert torch.allclose(ours, expected, atol=2e-4, rtol=1e-4)


def model(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.3 * x + 0.1)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_what_no_table_can_say_is_refused(option: str) -> None:
    with pytest.raises(InvalidRequest, match=option):
        table("ddim", {**SD15, option: True}, 10)


def test_steps_that_leave_the_schedule_are_refused() -> None:
    """The offset of SD 1.5's config pushes the first of 1000 timesteps to 1000; diffusers fails there."""
    with pytest.raises(InvalidRequest, match="ddim cannot do 1000 steps"):
        table("ddim", SD15, 1000)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"1001.*1000"):
        table("euler", SD15, 1001)
