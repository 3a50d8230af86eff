"""Checkpoints, and LoRAs too many for factors: other weights beside the base's, which stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from scumble.errors import Incompatible, InvalidRequest, Refused
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_registry.extract import extract
from scumble_server.executors.torch.executor import TorchExecutor
from support.tiny_variant import make_checkpoint

if TYPE_CHECKING:
    from support.running import Running

TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}


def request(*refs: str | Adapter, **changes: Any) -> Request:
    adapters = [ref if isinstance(ref, Adapter) else Adapter(ref=ref) for ref in refs]
    return Request.parse({**PLAIN, "adapters": adapters, **changes})


@pytest.fixture(scope="module")
def variants(
    tiny_base: Path,
    make_lora: Callable[..., Path],
    make_tiny_base: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., Running],
) -> Iterator[Running]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("variants")
    files = {
        "base": tiny_base,
        "my/dog": make_checkpoint(tiny_base, folder / "dog", seed=1),
        "my/cat": make_checkpoint(tiny_base, folder / "cat", seed=2, components=("unet", "text_encoder", "vae")),
        "my/velocity": make_checkpoint(tiny_base, folder / "velocity", seed=3),
        "l/a": make_lora(tiny_base, folder / "a", seed=1),
        "l/wide": make_lora(tiny_base, folder / "wide", seed=2, rank=160),
        "l/wider": make_lora(tiny_base, folder / "wider", seed=3, rank=150, full=True),
        "l/dora": make_lora(tiny_base, folder / "dora", seed=4, dora=True, text=False),
    }
    scheduler = files["my/velocity"] / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    with Registry.open(home, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        for name, path in files.items():
            if name != "base":
                registry.publish(path, name=name, base="tiny/base")
        registry.publish(make_tiny_base(folder / "other", seed=9), name="other/base")
        registry.publish(files["my/dog"], name="other/dog", base="other/base")
    running = start(home, "tiny/base", files)
    yield running
    running.service.close()


def reference(running: Running, diffusers_alone: Callable[..., Any], asked: Request, name: str) -> torch.Tensor:
    """diffusers' pipeline of that folder, with the request's LoRAs."""
    rest = tuple(adapter for adapter in asked.adapters if adapter.ref != name)
    files = {**running.files, "base": running.files[name]}
    latents: torch.Tensor = diffusers_alone(files, asked.model_copy(update={"adapters": rest})).latents
    return latents


CASES = {
    "unet": request("my/dog"),
    "unet, text encoder and vae": request("my/cat", num_images=2),
    "predicts velocity": request("my/velocity", scheduler="euler"),
    "a LoRA on it": request("my/dog", Adapter(ref="l/a", weight=0.4)),
    "a LoRA of the text encoder on it": request(Adapter(ref="l/a", weight=0.2, text_weight=0.8), "my/cat"),
    "a scheduled LoRA on it": request("my/dog", Adapter(ref="l/a", weight=0.5, start=0.25, end=0.8)),
    "a DoRA on it": request("my/dog", "l/dora"),
}


@pytest.mark.every_executor
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_equals_diffusers(variants: Running, diffusers_alone: Callable[..., Any], name: str) -> None:
    asked = CASES[name]
    ref = next(adapter.ref for adapter in asked.adapters if adapter.ref.startswith("my/"))
    ours = variants.run([asked])[0]
    theirs = reference(variants, diffusers_alone, asked, ref)
    assert (ours.latents - theirs).abs().max() <= TOLERANCE
    bare = diffusers_alone(variants.files, asked.model_copy(update={"adapters": ()})).latents
    assert (theirs - bare).abs().max() >= VISIBLE
    if len(asked.adapters) > 1:
        alone = variants.run([asked.model_copy(update={"adapters": (Adapter(ref=ref),)})])[0]
        assert (alone.latents - theirs).abs().max() >= VISIBLE, "what stacks on it acts"


def test_its_own_vae_makes_the_pixels(variants: Running) -> None:
    ours = variants.run([request("my/cat")])[0]
    pipeline = StableDiffusionPipeline.from_pretrained(variants.files["my/cat"], local_files_only=True)
    with torch.inference_mode():
        decoded = pipeline.vae.decode(ours.latents / pipeline.vae.config.scaling_factor).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (torch.from_numpy(ours.done.images).float() - expected).abs().max() <= 1


@pytest.mark.every_executor
def test_strangers_on_base_and_checkpoints_are_drawn_as_alone(variants: Running) -> None:
    requests = [
        request(*refs, seed=i)
        for i, refs in enumerate([(), ("my/dog",), ("l/a",), ("my/dog", "l/a"), ("my/cat",), ("my/dog",)])
    ]
    before = variants.service.stats().batch_sizes
    together = variants.run(requests)
    after = variants.service.stats().batch_sizes
    for each, result in zip(requests, together, strict=True):
        assert (result.latents - variants.run([each])[0].latents).abs().max() <= TOLERANCE
    assert after.get(3, 0) > before.get(3, 0), "the three on my/dog share steps"


def test_what_is_not_changed_is_shared_and_the_base_is_as_it_was(variants: Running) -> None:
    base = variants.executor
    assert isinstance(base, TorchExecutor)
    before = base.weights_digest()
    name = "unet.mid_block.attentions.0.proj_in"
    variant = base.variant({"unet": {"mid_block.attentions.0.proj_in.weight": torch.zeros_like(base.weight(name))}})
    assert not variant.weight(name).any()
    assert base.weight(name).any()
    others = [target for target in base.step_layout.targets if target != name]
    assert all(variant.weight(other).data_ptr() == base.weight(other).data_ptr() for other in others)
    variants.run([request("my/dog"), request("my/cat"), request("l/wide", "l/wider")])
    assert base.weights_digest() == before


def test_checkpoints_push_each_other_out_and_come_back_the_same(
    variants: Running, start: Callable[..., Running]
) -> None:
    budget = variants.service.bases[0].nbytes + 400_000
    few = start(variants.home, "tiny/base", variants.files, weights_cache_bytes=budget)
    first = few.run([request("my/dog")])[0]
    for _ in range(2):
        few.run([request("my/cat"), request("my/velocity"), request("my/dog")])
    again = few.run([request("my/dog")])[0]
    stats = few.service.stats().weights_cache
    few.service.close()
    assert torch.equal(first.latents, again.latents)
    assert stats.evictions >= 3
    assert stats.bytes <= budget


WIDE = {
    "two, with text": request(Adapter(ref="l/wide", weight=0.1), Adapter(ref="l/wider", weight=-0.05)),
    "scheduled": request(
        Adapter(ref="l/wide", weight=0.1, start=0.3), Adapter(ref="l/wider", weight=0.05, end=0.6), steps=10
    ),
    "blocks": request(  # diffusers takes none on layers outside blocks, so nothing of the full layout here
        Adapter(ref="l/wide", weight=0.2, blocks={"mid_block": 0.0, "up_blocks.1": 1.5}),
        Adapter(ref="l/wide", weight=0.1),
    ),
}


@pytest.mark.every_executor
@pytest.mark.parametrize("name", WIDE)
def test_more_columns_than_factors_hold_are_merged(
    variants: Running, diffusers_alone: Callable[..., Any], name: str
) -> None:
    ours = variants.run([WIDE[name]])[0]
    theirs = diffusers_alone(variants.files, WIDE[name]).latents
    assert (ours.latents - theirs).abs().max() <= TOLERANCE
    bare = diffusers_alone(variants.files, WIDE[name].model_copy(update={"adapters": ()})).latents
    assert (theirs - bare).abs().max() >= VISIBLE


@pytest.mark.every_executor
def test_many_columns_on_a_checkpoint(variants: Running, diffusers_alone: Callable[..., Any]) -> None:
    asked = request("my/cat", Adapter(ref="l/wide", weight=0.1), Adapter(ref="l/wider", weight=0.05))
    theirs = reference(variants, diffusers_alone, asked, "my/cat")
    assert (variants.run([asked])[0].latents - theirs).abs().max() <= TOLERANCE


def test_beyond_the_budget_it_is_refused_with_the_numbers(variants: Running, start: Callable[..., Running]) -> None:
    budget = variants.service.bases[0].nbytes + 1000
    none = start(variants.home, "tiny/base", variants.files, weights_cache_bytes=budget)
    for asked in (request("l/wide", "l/wider"), request("my/dog")):
        with pytest.raises(Refused, match=f"bytes of weight memory, the budget is {budget}"):
            none.run([asked])
    none.service.close()


def test_factors_of_full_rank_draw_what_the_checkpoint_draws(variants: Running, tmp_path: Path) -> None:
    with Registry.open(variants.home) as registry:
        extract(registry, "my/dog", 1024, "my/dog-factors", tmp_path)
    checkpoint, factors = variants.run([request("my/dog"), request("my/dog-factors")])
    assert (checkpoint.latents - factors.latents).abs().max() <= TOLERANCE
    half = variants.run([request(Adapter(ref="my/dog-factors", weight=0.5))])[0]
    assert (half.latents - factors.latents).abs().max() >= VISIBLE


@pytest.mark.parametrize(
    ("adapters", "error", "says"),
    [
        ([Adapter(ref="my/dog", weight=0.5)], InvalidRequest, "registry extract my/dog@1"),
        ([Adapter(ref="my/dog", start=0.5)], InvalidRequest, "start means nothing"),
        ([Adapter(ref="my/dog"), Adapter(ref="my/cat")], InvalidRequest, "one"),
        ([Adapter(ref="other/dog")], Incompatible, "another version of the base"),
    ],
)
def test_what_cannot_be_is_refused_at_the_edge(
    variants: Running, adapters: list[Adapter], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        variants.run([request(*adapters)])
