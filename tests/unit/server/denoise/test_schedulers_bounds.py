"""A table of the greatest number of steps is made, or refused, in a bounded CPU time, whatever is asked for."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import InvalidRequest
from scumble_server.denoise import schedulers
from scumble_server.denoise.schedulers import table
from support.cpu_time import cpu_seconds
from support.oracle import SCHEDULERS
from support.scheduler_configs import configs
from support.searching import examples

MOST_STEPS = 1000
CPU_SECONDS = 0.1
SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": MOST_STEPS,
    "original_inference_steps": MOST_STEPS,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
SPACED = set(SCHEDULERS) - {"dpmpp_sde", "dpmpp_sde_karras"}
NOISED = {"ddim", "tcd"}


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """What torch and diffusers do only once does not count."""
    for name in SCHEDULERS:
        table(name, SD15, 4)


def tabled_seconds(name: str, config: dict[str, Any], steps: int, **options: Any) -> float:
    """With an empty cache."""

    def make() -> None:
        schedulers._table.cache_clear()
        with contextlib.suppress(InvalidRequest):
            table(name, config, steps, **options)

    return cpu_seconds(make, CPU_SECONDS)


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_each_scheduler(name: str, steps: int, predicts: str) -> None:
    assert tabled_seconds(name, {**SD15, "prediction_type": predicts}, steps) <= CPU_SECONDS


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", sorted(SPACED))
def test_each_option(name: str, spacing: str, rescale: bool, steps: int) -> None:
    eta = 0.5 if name in NOISED else None
    seconds = tabled_seconds(name, SD15, steps, timestep_spacing=spacing, rescale_betas=rescale, eta=eta)
    assert seconds <= CPU_SECONDS


@given(name=st.sampled_from(sorted(SCHEDULERS)), config=configs(), steps=st.integers(1, MOST_STEPS), data=st.data())
@settings(max_examples=examples(100), deadline=None)
def test_any_config(name: str, config: dict[str, Any], steps: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, steps - 1))
    eta = data.draw(st.floats(0, 1)) if name in NOISED else None
    assert tabled_seconds(name, config, steps, start=start, eta=eta) <= CPU_SECONDS


def test_a_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="gives 62") as first:
        table("ddim", SD15, 61, timestep_spacing="trailing")

    def never(*_: object) -> None:
        raise AssertionError("it was made anew")

    monkeypatch.setattr(schedulers, "_make", never)
    with pytest.raises(InvalidRequest, match="gives 62") as second:
        table("ddim", SD15, 61, timestep_spacing="trailing")
    assert second.value is not first.value
    assert second.value.fields == first.value.fields
