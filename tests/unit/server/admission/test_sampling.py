"""Every scheduler and its options through the service, against diffusers' pipeline; profiles that adapters bring."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from scumble.errors import InvalidRequest
from scumble.redraw import request_from_receipt
from scumble.request import Adapter, Request, SchedulerName
from scumble_registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.running import Running

TOLERANCE = 1e-3
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
NAMES = get_args(SchedulerName)


def request(**changes: object) -> Request:
    return Request.parse({**PLAIN, **changes})


CASES = {name: request(scheduler=name) for name in NAMES} | {
    "ddim with noise": request(scheduler="ddim", options={"eta": 0.7}),
    "tcd with noise": request(scheduler="tcd", options={"eta": 0.3}, num_images=3),
    "several images": request(scheduler="euler_a", num_images=3),
    "several images, lcm": request(scheduler="lcm", num_images=2, guidance_scale=1.0, steps=4),
    "trailing": request(scheduler="euler", options={"timestep_spacing": "trailing"}),
    # Leading, because a model of noise cannot begin where there is no signal.
    "rescaled": request(scheduler="unipc", options={"timestep_spacing": "leading", "rescale_betas": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_request_is_drawn_as_diffusers_draws_it(
    running: Running, diffusers_alone: Callable[..., Any], name: str
) -> None:
    ours = running.run([CASES[name]])[0]
    reference = diffusers_alone(running.files, CASES[name])
    assert (ours.latents - reference.latents).abs().max() <= TOLERANCE


def test_schedulers_and_options_make_different_pictures(running: Running) -> None:
    """Else the test above would not tell one from another."""
    alone = {name: case for name, case in CASES.items() if case.num_images == 1 and case.steps == 8}
    drawn = [running.run([case])[0].latents for case in alone.values()]
    for one, other in itertools.combinations(drawn, 2):
        assert (one - other).abs().max() > 10 * TOLERANCE


def test_a_batch_of_every_scheduler_equals_each_alone(running: Running) -> None:
    mixed = [each.model_copy(update={"seed": 50 + i, "steps": 6 + i % 4}) for i, each in enumerate(CASES.values())]
    before = running.service.stats()
    together = running.run(mixed)
    after = running.service.stats()
    assert after.steps - before.steps < sum(each.steps or 0 for each in mixed) / 2
    for each, batched in zip(mixed, together, strict=True):
        assert (batched.latents - running.run([each])[0].latents).abs().max() <= TOLERANCE


def test_a_step_that_is_tried_again_draws_no_second_noise(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(scheduler="euler_a", num_images=2)
    undisturbed = running.run([asked])[0].latents
    executor = running.executor
    denoise, calls = executor.denoise, []

    def failing_once(*inputs: Any) -> Any:
        calls.append(inputs)
        if len(calls) == 4:
            raise RuntimeError("not in this batch")
        return denoise(*inputs)

    monkeypatch.setattr(executor, "denoise", failing_once)
    assert (running.run([asked])[0].latents - undisturbed).abs().max() <= TOLERANCE
    assert len(calls) == 8 + 2  # the fourth again, image by image


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_every_scheduler_draws_with_bases_that_predict_something_else(
    tiny_base: Path,
    tmp_path: Path,
    start: Callable[..., Running],
    diffusers_alone: Callable[..., Any],
    predicts: str,
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": predicts}))
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(folder, name="other/base")
    running = start(tmp_path / "home", "other/base", {"base": folder})
    try:
        requests = [request(scheduler=name) for name in NAMES if (name, predicts) != ("euler_a", "sample")]
        for asked, ours in zip(requests, running.run(requests), strict=True):
            reference = diffusers_alone(running.files, asked)
            assert (ours.latents - reference.latents).abs().max() <= TOLERANCE, asked.scheduler
        if predicts == "sample":
            with pytest.raises(InvalidRequest, match="euler_a cannot draw with a model of sample"):
                running.run([request(scheduler="euler_a")])
    finally:
        running.service.close()


@pytest.fixture(scope="module")
def profiled(running: Running) -> Running:
    """`p/lcm` and `p/tcd` bring sampling; `p/lcm2` brings the same as `p/lcm`."""
    lcm = {"scheduler": "lcm", "steps": 4, "guidance_scale": 1.0}
    tcd = {"scheduler": "tcd", "steps": 4, "guidance_scale": 1.0, "eta": 0.3}
    with Registry.open(running.home) as registry:
        for name, sampling, file in (("p/lcm", lcm, "l/a"), ("p/lcm2", lcm, "l/b"), ("p/tcd", tcd, "l/plain")):
            registry.publish(running.files[file], name, base="tiny/base", sampling=sampling)
            running.files[name] = running.files[file]
    return running


LEFT_OUT = {"prompt": "a red apple", "seed": 7, "width": 64, "height": 64}


def asked_with(*refs: str, **changes: Any) -> Request:
    return Request.parse({**LEFT_OUT, "adapters": [Adapter(ref=ref, weight=0.3) for ref in refs], **changes})


def sampled(running: Running, asked: Request) -> dict[str, Any]:
    shown = running.run([asked])[0].done.receipt.request
    return shown.model_dump(include={"scheduler", "steps", "guidance_scale"}) | shown.options


def test_what_a_request_leaves_out_is_as_its_adapter_was_made_for(
    profiled: Running, diffusers_alone: Callable[..., Any]
) -> None:
    brought = {"scheduler": "tcd", "steps": 4, "guidance_scale": 1.0}
    result = profiled.run([asked_with("p/tcd")])[0]
    explicit = asked_with("p/tcd", **brought, options={"eta": 0.3})
    assert (result.latents - diffusers_alone(profiled.files, explicit).latents).abs().max() <= TOLERANCE
    assert sampled(profiled, asked_with("p/tcd")) == {**brought, "eta": 0.3}
    again = request_from_receipt(result.done.receipt)
    assert (again.scheduler, again.steps, again.options.eta) == ("tcd", 4, 0.3)
    assert (profiled.run([again])[0].latents - result.latents).abs().max() <= TOLERANCE


def test_what_a_request_says_goes_first(profiled: Running) -> None:
    asked = asked_with("p/tcd", steps=3, guidance_scale=2.0, options={"eta": 0.1})
    assert sampled(profiled, asked) == {"scheduler": "tcd", "steps": 3, "guidance_scale": 2.0, "eta": 0.1}


def test_a_profiles_options_belong_to_its_scheduler(profiled: Running) -> None:
    asked = asked_with("p/tcd", scheduler="euler")
    assert sampled(profiled, asked) == {"scheduler": "euler", "steps": 4, "guidance_scale": 1.0}


def test_an_adapter_that_is_dropped_brings_nothing(profiled: Running) -> None:
    defaults = profiled.service.bases[0].defaults
    without = Adapter(ref="p/lcm", weight=0)
    asked = Request.parse({**LEFT_OUT, "adapters": [without]})
    expected = {name: getattr(defaults, name) for name in ("scheduler", "steps", "guidance_scale")}
    assert sampled(profiled, asked) == expected


def test_adapters_that_were_made_for_the_same_agree(profiled: Running) -> None:
    assert sampled(profiled, asked_with("p/lcm", "p/lcm2", "l/a"))["scheduler"] == "lcm"


def test_adapters_that_disagree_are_refused_until_the_request_decides(profiled: Running) -> None:
    with pytest.raises(
        InvalidRequest, match=r"p/lcm for scheduler lcm, p/tcd for scheduler tcd; set scheduler"
    ) as caught:
        profiled.run([asked_with("p/lcm", "p/tcd")])
    assert caught.value.fields["field"] == "scheduler"
    assert sampled(profiled, asked_with("p/lcm", "p/tcd", scheduler="lcm"))["steps"] == 4


def test_an_option_of_another_scheduler_is_refused_before_any_work(running: Running) -> None:
    with pytest.raises(InvalidRequest, match="euler has no eta") as caught:
        running.run([request(scheduler="euler", options={"eta": 0.5})])
    assert caught.value.fields["field"] == "options.eta"
