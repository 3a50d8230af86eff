"""A table's update equals diffusers' own scheduler, step for step."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from diffusers import (
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import InvalidRequest
from scumble.request import SchedulerName
from scumble_server.denoise.noise import Noise
from scumble_server.denoise.schedulers import HISTORY, Table, first_step, table
from support.oracle import SCHEDULERS

RANDOM = {"euler_a", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "dpmpp_sde", "dpmpp_sde_karras", "lcm"}
NO_SPACING = {"dpmpp_sde", "dpmpp_sde_karras"}
SIDE = 8
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
WITH_DEFAULTS: dict[str, Any] = dict(PNDMScheduler.from_config(SD15).config)


def make(name: str, config: dict[str, Any], **changes: Any) -> Any:
    kind, named = SCHEDULERS[name]
    return kind.from_config(config, **named, **changes)


def model(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.3 * x + 0.1)


def compare(scheduler: Any, ours: Table, steps: int, seed: int, *, start: int = 0, eta: float = 0.0) -> None:
    """Both from the same seed; every sample on the way is compared."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):  # without it diffusers fails where the first timestep comes twice
        scheduler.set_begin_index(start)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = Noise(seed, SIDE, SIDE)
    expected = torch.randn((1, 4, SIDE, SIDE), generator=generator) * scheduler.init_noise_sigma
    x = noise.draw() * ours.init_sigma
    asks = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in {"generator": generator, "eta": eta}.items() if key in asks}
    assert torch.equal(ours.timestep, timesteps.float())
    history, tolerance = torch.zeros(HISTORY, *x.shape), 2e-4
    for i, timestep in enumerate(timesteps):
        output = model(scheduler.scale_model_input(expected, timestep))
        # Euler's samples are as large as its sigmas: up to 4096, of which a step cancels nearly all.
        tolerance = max(tolerance, 2e-4 * float(expected.abs().max()) / 50)
        expected = scheduler.step(output, timestep, expected, **extra)[0]
        n = noise.of_step(i) if ours.draws[i] else torch.zeros_like(x)
        state = torch.stack([x, *history, model(ours.c_in[i] * x), n])
        outputs = torch.einsum("oi,ichw->ochw", ours.matrix[i], state)
        x, history = outputs[0], outputs[1:-1]
        assert torch.allclose(x, expected[0], atol=tolerance, rtol=1e-4), f"step {i}"


def draw_alone(scheduler: Any, steps: int, eta: float) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 4, SIDE, SIDE)
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x), timestep, x, eta=eta)[0]
    return x


def test_every_scheduler_of_a_request_is_known() -> None:
    assert set(get_args(SchedulerName)) == set(SCHEDULERS)
    for name in SCHEDULERS:
        assert table(name, SD15, 4).steps == 4


@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    steps=st.integers(1, 50),
    config=st.sampled_from([SD15, WITH_DEFAULTS]),
    predicts=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_equal_to_diffusers(name: str, steps: int, config: dict[str, Any], predicts: str, seed: int) -> None:
    config = {**config, "prediction_type": predicts}
    config["_use_default_values"] = [key for key in config.get("_use_default_values", []) if key != "prediction_type"]
    if (name, predicts) == ("euler_a", "sample"):
        with pytest.raises(InvalidRequest, match="euler_a cannot draw with a model of sample"):
            table(name, config, steps)
        return
    compare(make(name, config), table(name, config, steps), steps, seed)


@given(
    name=st.sampled_from(sorted(set(SCHEDULERS) - NO_SPACING)),
    steps=st.integers(1, 30),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    rescale=st.booleans(),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_options_do_what_they_do_in_diffusers(name: str, steps: int, spacing: str, rescale: bool, eta: float) -> None:
    # Without signal at the last timestep only a model of velocity can begin there.
    config = {**SD15, "prediction_type": "v_prediction"}
    options: dict[str, Any] = {"timestep_spacing": spacing, "rescale_betas": rescale}
    if name in {"ddim", "tcd"}:
        options["eta"] = eta
    scheduler = make(name, config, timestep_spacing=spacing, rescale_betas_zero_snr=rescale)
    try:
        ours = table(name, config, steps, **options)
    except InvalidRequest as refused:
        if "not finite" not in refused.message:
            raise
        assert not draw_alone(scheduler, steps, eta).isfinite().all()
    else:
        compare(scheduler, ours, steps, 3, eta=eta)


@given(
    name=st.sampled_from(sorted(SCHEDULERS)),
    steps=st.integers(1, 30),
    strength=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_the_end_of_a_schedule_is_what_a_picture_is_changed_with(name: str, steps: int, strength: float) -> None:
    start = first_step(steps, strength)
    pipeline = StableDiffusionImg2ImgPipeline.__new__(StableDiffusionImg2ImgPipeline)
    scheduler = make(name, SD15)
    object.__setattr__(pipeline, "scheduler", scheduler)
    scheduler.set_timesteps(steps)
    timesteps, left = pipeline.get_timesteps(steps, strength, "cpu")
    if not left:
        with pytest.raises(InvalidRequest, match="none is left"):
            table(name, SD15, steps, start=start)
        return
    ours = table(name, SD15, steps, start=start)
    assert torch.equal(ours.timestep, timesteps.float())
    original, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noised = ours.noised[0, 0] * original + ours.noised[0, 1] * noise
    assert torch.allclose(noised, scheduler.add_noise(original, noise, timesteps[:1]), atol=1e-5, rtol=1e-5)
    compare(make(name, SD15), ours, steps, 5, start=start)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("dpmpp")])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_solvers_of_third_order_remember_one_more(name: str, steps: int) -> None:
    config = {**SD15, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
    compare(make(name, config), table(name, config, steps), steps, seed=2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_estimate_of_the_last_step_is_the_picture(name: str) -> None:
    """All but tcd end at a sigma of zero; it ends at the first timestep, where there is 3 % of noise."""
    last = table(name, {**SD15, "set_alpha_to_one": True, "steps_offset": 0}, 10).matrix[-1]
    assert torch.allclose(last[-1], last[0], atol=0.05 if name == "tcd" else 1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_drawn_where_diffusers_draws_it(name: str) -> None:
    assert any(table(name, SD15, 6).draws) == (name in RANDOM)
    if name in {"ddim", "tcd"}:
        assert any(table(name, SD15, 6, eta=0.5).draws)


def test_noise_of_a_step_that_is_tried_again_is_the_same() -> None:
    noise = Noise(1, 8, 8)
    first, second = noise.of_step(3), noise.of_step(3)
    assert torch.equal(first, second)
    assert not torch.equal(first, noise.of_step(4))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("dpmpp_sde", "timestep_spacing", "trailing"),
        ("dpmpp_sde_karras", "rescale_betas", True),
        ("euler", "eta", 0.0),
        ("unipc", "eta", 0.5),
        ("lcm", "eta", 1.0),
    ],
)
def test_an_option_that_a_scheduler_does_not_have_is_refused_by_name(name: str, option: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} has no {option}") as caught:
        table(name, SD15, 4, **{option: value})  # type: ignore[arg-type]
    assert caught.value.fields["field"] == f"options.{option}"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_what_no_table_can_say_is_refused(name: str, option: str) -> None:
    with pytest.raises(InvalidRequest, match=option):
        table(name, {**SD15, option: True}, 10)


@pytest.mark.parametrize(
    ("name", "changes", "steps", "message"),
    [
        # The offset of SD 1.5's config pushes the first of 1000 timesteps to 1000; diffusers fails there.
        ("ddim", {}, 1000, "ddim cannot do 1000 steps"),
        ("euler", {}, 1001, "1001.*1000"),
        ("lcm", {}, 51, "lcm cannot do 51 steps"),
        # diffusers makes 62 timesteps of these 61.
        ("ddim", {"timestep_spacing": "trailing"}, 61, "gives 62"),
        # Noise cannot be told from a sample that is nothing else.
        ("ddim", {"timestep_spacing": "trailing", "rescale_betas": True}, 10, "not finite"),
    ],
)
def test_steps_that_leave_the_schedule_are_refused(name: str, changes: Any, steps: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        table(name, SD15, steps, **changes)
    assert caught.value.fields["field"] == "steps"


def test_a_base_of_a_prediction_that_is_not_served_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidRequest, match="prediction_type 'flow_prediction'") as caught:
        table("ddim", {**SD15, "prediction_type": "flow_prediction"}, 10)
    assert caught.value.fields["field"] == "scheduler"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("unipc", {"solver_order": 3, "_class_name": "UniPCMultistepScheduler"}, "solver_order"),
        ("unipc", {"solver_order": 10**6, "_class_name": "UniPCMultistepScheduler"}, "solver_order needs 9 earlier"),
        ("unipc", {"solver_p": {"_class_name": "X"}, "_class_name": "UniPCMultistepScheduler"}, "solver_p"),
        ("dpmpp_sde", {"solver_order": 0, "_class_name": "DPMSolverSinglestepScheduler"}, "solver_order 0"),
        ("ddim", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        (
            "dpmpp_2m_karras",
            {"_class_name": "X", "use_exponential_sigmas": True},
            "dpmpp_2m_karras cannot serve this base",
        ),
    ],
)
def test_a_base_that_no_table_can_serve_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        table(name, {**SD15, **config}, 10)
