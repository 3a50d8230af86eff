"""Requests with the webui's hypernetworks equal diffusers' pipeline with their formula in its attentions.

No library applies such networks, so the oracle is an attention processor written down here: diffusers' own pipeline,
UNet and schedulers, and in each attention, cross and self, the contexts changed as the formula says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from scumble.errors import Incompatible, InvalidRequest
from scumble.receipt import DroppedAdapter
from scumble.request import Adapter, Request
from scumble_build.graphs.hypernetwork import Hypernetwork
from scumble_registry import Registry
from support.tiny_hypernetwork import WebuiAttention, WebuiHypernetwork
from support.tiny_variant import make_checkpoint

TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
TEXT, NARROW, WIDE = 32, 24, 48  # of the text, and of the hidden states at the two levels of a base of width 24

ENTRIES: dict[str, dict[str, Any]] = {
    "h/cross": {"widths": [TEXT], "seed": 1, "gain": 1.5},
    "h/self": {"widths": [NARROW, WIDE], "seed": 2, "activation": "linear"},
    "h/both": {
        "widths": [NARROW, TEXT, WIDE],
        "seed": 3,
        "activation": "swish",
        "norm": True,
        "structure": (1, 1.5, 2, 1),
        "activate_output": False,
    },
    "h/other": {"widths": [NARROW, TEXT], "seed": 4, "activation": "tanh", "dropout": (0, 0.3, 0)},
}


def request(*adapters: dict[str, Any], **changes: Any) -> Request:
    return Request.parse({**PLAIN, "adapters": [Adapter.model_validate(each) for each in adapters], **changes})


CROSS, SELF, BOTH, OTHER = ({"ref": name} for name in ENTRIES)

CASES: dict[str, Request] = {
    "cross only": request(CROSS),
    "self only": request(SELF),
    "both": request(BOTH),
    "no guidance": request(BOTH, guidance_scale=1.0),
    "weight": request({**BOTH, "weight": 0.4}),
    "negative weight": request({**CROSS, "weight": -0.5}, {**SELF, "weight": -0.3}),
    "two chained": request(BOTH, OTHER),
    "the other way round": request(OTHER, BOTH),
    "four chained, several images": request(CROSS, {**SELF, "weight": 0.5}, OTHER, BOTH, num_images=2),
    "the same twice": request({**BOTH, "weight": 0.5}, {**BOTH, "weight": 0.3}),
    "start and end": request({**BOTH, "start": 0.3}, {**OTHER, "start": 0.1, "end": 0.55}, steps=10),
    "end of all": request({**BOTH, "end": 0.5}, scheduler="euler"),
    "not square": request(BOTH, width=96, height=40),
    "beside a lora": request({"ref": "l/a", "weight": 0.3}, {**BOTH, "weight": 0.6}, CROSS),
}


@dataclass
class World:
    running: Any
    base: Path
    lora: Path
    checkpoint: Path
    theirs: dict[str, WebuiHypernetwork]


@pytest.fixture(scope="module")
def world(
    make_tiny_base: Callable[..., Path],
    make_lora: Callable[..., Path],
    start: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hypernetworks")
    base = make_tiny_base(folder / "base", width=NARROW)
    lora = make_lora(base, folder / "lora", seed=1)
    checkpoint = make_checkpoint(base, folder / "dog", seed=1, components=("unet", "text_encoder"))
    theirs = {name: WebuiHypernetwork(**how) for name, how in ENTRIES.items()}
    with Registry.open(folder / "home", create=True) as registry:
        registry.publish(base, "tiny/base")
        registry.publish(lora, "l/a", base="tiny/base")
        registry.publish(checkpoint, "my/dog", base="tiny/base")
        for name, each in theirs.items():
            registry.publish(each.save(folder / f"{name}.safetensors"), name, base="tiny/base")
    running = start(folder / "home", "tiny/base", {})
    yield World(running, base, lora, checkpoint, theirs)
    running.service.close()


def by_the_formula(base: Path, lora: Path, theirs: dict[str, WebuiHypernetwork], asked: Request) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    kind = {"euler": EulerDiscreteScheduler}.get(asked.scheduler or "", DDIMScheduler)
    pipeline.scheduler = kind.from_config(DDIMScheduler.load_config(base / "scheduler"))
    for adapter in asked.adapters:
        if adapter.ref == "l/a":
            pipeline.load_lora_weights(lora, adapter_name="a")
            pipeline.set_adapters(["a"], [adapter.weight])
    attention = WebuiAttention()
    pipeline.unet.set_attn_processor(attention)

    def before(step: int) -> None:
        attention.acting = [
            (theirs[each.ref], each.weight)
            for each in asked.adapters
            if each.ref in theirs and each.is_active(step, asked.steps or 0)
        ]

    def after(_pipeline: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        before(step + 1)
        return state

    before(0)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            width=asked.width,
            height=asked.height,
            num_images_per_prompt=asked.num_images,
            generator=[torch.Generator("cpu").manual_seed((asked.seed or 0) + i) for i in range(asked.num_images)],
            callback_on_step_end=after,
            output_type="latent",
        ).images
    return latents


def without(asked: Request, ref: str) -> Request:
    kept = tuple(adapter for adapter in asked.adapters if adapter.ref != ref)
    return asked.model_copy(update={"adapters": kept})


@pytest.mark.every_executor
@pytest.mark.parametrize("name", CASES)
def test_alone_equals_the_formula_in_diffusers(world: World, name: str) -> None:
    asked = CASES[name]
    reference = by_the_formula(world.base, world.lora, world.theirs, asked)
    assert (world.running.run([asked])[0].latents - reference).abs().max() <= TOLERANCE
    for ref in {adapter.ref for adapter in asked.adapters}:
        bare = by_the_formula(world.base, world.lora, world.theirs, without(asked, ref))
        assert (reference - bare).abs().max() >= VISIBLE, f"the oracle does not show {ref}"


def test_on_a_checkpoint(world: World) -> None:
    asked = request({"ref": "my/dog"}, BOTH, {**OTHER, "weight": 0.5})
    own = without(asked, "my/dog")
    reference = by_the_formula(world.checkpoint, world.lora, world.theirs, own)
    on_base, on_checkpoint = world.running.run([own, asked])
    assert (on_checkpoint.latents - reference).abs().max() <= TOLERANCE
    assert (on_base.latents - reference).abs().max() >= VISIBLE


def test_the_order_of_a_chain_matters(world: World) -> None:
    one, other = world.running.run([CASES["two chained"], CASES["the other way round"]])
    assert (one.latents - other.latents).abs().max() >= VISIBLE


def test_strangers_in_one_batch_are_as_alone(world: World) -> None:
    """With chains shared and not, at other weights, with another schedule, with a LoRA, and with nothing."""
    mixed = [
        request(BOTH),
        request({**BOTH, "weight": 0.4}, seed=8),
        request(),
        request(CROSS, guidance_scale=1.0),
        request({**OTHER, "end": 0.5}, {**BOTH, "start": 0.3}, steps=9),
        request({"ref": "l/a", "weight": 0.3}),
        request({**SELF, "weight": -0.3}, {"ref": "l/a", "weight": 0.3}, negative_prompt="blurry"),
    ]
    before = world.running.service.stats()
    together = world.running.run(mixed)
    after = world.running.service.stats()
    for asked, batched in zip(mixed, together, strict=True):
        assert (batched.latents - world.running.run([asked])[0].latents).abs().max() <= TOLERANCE
    assert after.mixed_steps - before.mixed_steps >= 8


def test_rows_with_one_chain_share_its_networks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = Hypernetwork.forward

    def counted(self: Hypernetwork, keys: Tensor, values: Tensor, weight: Any) -> Any:
        calls.append(len(keys))
        return forward(self, keys, values, weight)

    monkeypatch.setattr(Hypernetwork, "forward", counted)
    world.running.run([request(SELF, num_images=3, seed=11)])
    assert set(calls) == {6}
    calls.clear()
    world.running.run([request(seed=12), request(CROSS, seed=12)])
    assert all(rows <= 2 for rows in calls), "nothing but the text, once"
    assert len(calls) <= 1


def test_one_width_of_text_and_hidden_states_changes_both(
    tiny_base: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = {"h/shared": WebuiHypernetwork([TEXT], seed=5, gain=1.5)}  # tiny_base's middle block has the text's width
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(tiny_base, "tiny/base")
        registry.publish(theirs["h/shared"].save(tmp_path / "a.safetensors"), "h/shared", base="tiny/base")
    running = start(tmp_path / "home", "tiny/base", {})
    try:
        asked = request({"ref": "h/shared"})
        reference = by_the_formula(tiny_base, tmp_path, theirs, asked)
        assert (running.run([asked])[0].latents - reference).abs().max() <= TOLERANCE
    finally:
        running.service.close()


def test_weight_0_is_dropped(world: World) -> None:
    dropped, plain = world.running.run([request({**BOTH, "weight": 0.0}), request()])
    assert (dropped.latents - plain.latents).abs().max() <= TOLERANCE
    assert dropped.done.receipt.dropped == (DroppedAdapter(ref="h/both", reason="weight 0"),)


def test_the_receipt_says_what_was_bound(world: World) -> None:
    (found,) = world.running.run([request({**BOTH, "weight": 0.4})])[0].done.receipt.adapters
    assert (found.kind, found.details["type"], found.weight) == ("hypernetwork", "context", 0.4)
    assert found.details["widths"] == [NARROW, TEXT, WIDE]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"blocks": {"IN01": 0.5}}, "adapters.blocks"),
        ({"text_weight": 0.5}, "adapters.text_weight"),
        ({"text": "a cat"}, "adapters.text"),
        ({"token": "ink"}, "adapters.token"),
    ],
)
def test_fields_without_meaning_are_refused_by_name(world: World, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match="means nothing") as caught:
        world.running.run([request({**BOTH, **fields})])
    assert caught.value.fields["field"] == field


def test_a_network_of_another_base_is_refused_when_asked_for(world: World, tmp_path: Path) -> None:
    file = WebuiHypernetwork([TEXT, 320], seed=1).save(tmp_path / "a.safetensors")
    with Registry.open(world.running.home, create=False) as registry:
        registry.publish(file, "h/elsewhere")
    with pytest.raises(Incompatible, match="contexts of width 320"):
        world.running.run([request({"ref": "h/elsewhere"})])
