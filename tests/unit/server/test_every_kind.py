"""Sixteen strangers with random mixes of every kind share batches, and each is drawn as it would be alone.

Three ways to break that on purpose show that the comparison would see it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import scumble_server.conditioning.phases
import scumble_server.factors.rows
from scumble.request import Request
from scumble_build.graphs.adapted import Factors
from scumble_registry import Registry
from scumble_server.denoise.batch import Batch
from scumble_server.denoise.image import Image
from support.control_nets import load_unet
from support.every_kind import EveryKind, publish_every_kind, random_request, request_for, ways_to_ask
from support.tiny_families import make_tiny_sdxl

if TYPE_CHECKING:
    from support.running import Running

TOLERANCE = 1e-3
WRONG = 10 * TOLERANCE


@dataclass
class Shared:
    running: Running
    every: EveryKind

    def draw(self, requests: Sequence[Request]) -> list[Tensor]:
        return [result.latents for result in self.running.run(requests)]

    def draw_alone(self, requests: Sequence[Request]) -> list[Tensor]:
        return [self.draw([request])[0] for request in requests]


@contextmanager
def serve(base: Path, folders: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Shared]:
    home = folders.mktemp("every")
    with Registry.open(home, create=True) as registry:
        every = publish_every_kind(registry, base, folders.mktemp("kinds"))
    running = start(home, every.base, every.files, max_batch_images=16)
    yield Shared(running, every)
    running.service.close()


@pytest.fixture(scope="module")
def shared(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]
) -> Iterator[Shared]:
    with serve(tiny_base, tmp_path_factory, start) as shared:
        yield shared


@pytest.fixture(scope="module")
def shared_xl(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Shared]:
    with serve(make_tiny_sdxl(tmp_path_factory.mktemp("xl") / "base"), tmp_path_factory, start) as shared:
        yield shared


def sixteen(every: EveryKind, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [random_request(every, rng) for _ in range(16)]


def largest_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sixteen_strangers_are_drawn_as_alone(shared: Shared, seed: int) -> None:
    check_strangers(shared, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_sixteen_strangers_on_sdxl_are_drawn_as_alone(shared_xl: Shared, seed: int) -> None:
    check_strangers(shared_xl, seed)


def check_strangers(shared: Shared, seed: int) -> None:
    requests = sixteen(shared.every, seed)
    before = shared.running.service.stats().mixed_steps
    together = shared.draw(requests)
    after = shared.running.service.stats()
    assert after.mixed_steps > before
    assert after.failed_steps == 0, "a step that fails is tried again row by row, which would hide it"
    assert largest_difference(together, shared.draw_alone(requests)) <= TOLERANCE


def swap_two_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows get the factors of their neighbours."""
    stack = scumble_server.factors.rows.stack_factors

    def swapped(*arguments: Any) -> Factors | None:
        factors = stack(*arguments)
        if factors is None:
            return None
        return replace(factors, small=replace(factors.small, table=factors.small.table.flip(0)))

    monkeypatch.setattr(scumble_server.factors.rows, "stack_factors", swapped)


def keep_a_stale_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot still holds what an earlier batch of the same shape put there."""
    stack = scumble_server.factors.rows.stack_factors
    first: dict[Any, Factors] = {}

    def stale(*arguments: Any) -> Factors | None:
        factors = stack(*arguments)
        if factors is None:
            return None
        old = first.setdefault(factors.small.table.shape, factors)
        return replace(factors, small=replace(factors.small, table=old.small.table))

    monkeypatch.setattr(scumble_server.factors.rows, "stack_factors", stale)


def miss_the_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values stay those of a request's first phase."""
    project = scumble_server.conditioning.phases._project
    first: dict[Any, Tensor] = {}

    def same(context: Any, text: Any, *rest: Any) -> Tensor:
        return first.setdefault((id(context.settings), text.key), project(context, text, *rest))

    monkeypatch.setattr(scumble_server.conditioning.phases, "_project", same)


def never_restack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch goes on as it was stacked, though its rows are in another phase."""

    def fits(self: Batch, images: Sequence[Image]) -> bool:
        return {id(image) for image in images} == {id(image) for image in self.images}

    monkeypatch.setattr(Batch, "fits", fits)


@pytest.mark.parametrize("mutate", [swap_two_slots, keep_a_stale_slot, miss_the_transition, never_restack])
def test_a_mistake_would_be_seen(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    requests = sixteen(shared.every, 0)
    alone = shared.draw_alone(requests)
    mutate(monkeypatch)
    assert largest_difference(shared.draw(requests), alone) >= WRONG


def everything(every: EveryKind, *, without: str | None = None) -> Request:
    """One request with an adapter of every kind."""
    ways = ways_to_ask(random.Random(3))
    adapters = [{"ref": name, **way} for name, way in ways.items() if name != without]
    return request_for(
        every, adapters, prompt="a <bad> apple", seed=5, steps=8, guidance_scale=5.0, width=64, height=64
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_every_kind_reaches_every_prompt_of_a_picture(shared: Shared, guidance: float) -> None:
    """Two halves of a prompt, each with all adapters, are the whole."""
    ways = ways_to_ask(random.Random(3))
    ways["hyper/predictor"]["text"] = "ink on paper"
    ways["net/one"]["mode"] = "guess"
    adapters = [{"ref": name, **way} for name, way in ways.items()]
    fields = {"seed": 5, "steps": 8, "guidance_scale": guidance, "width": 64, "height": 64}
    options = {"grammar": "webui"}
    whole = request_for(shared.every, adapters, prompt="a <bad> apple", options=options, **fields)
    halves = request_for(
        shared.every, adapters, prompt="a <bad> apple :0.4 AND a <bad> apple :0.6", options=options, **fields
    )
    # A part keeps the space that AND leaves before it, which is none to the tokenizer.
    assert largest_difference(shared.draw([whole]), shared.draw([halves])) <= TOLERANCE


@pytest.mark.parametrize("name", sorted(ways_to_ask(random.Random(0))))
def test_removing_any_adapter_from_everything_changes_the_picture(shared: Shared, name: str) -> None:
    with_it, without = shared.draw([everything(shared.every), everything(shared.every, without=name)])
    assert (with_it - without).abs().max() >= WRONG


@pytest.mark.parametrize("name", sorted(ways_to_ask(random.Random(0))))
def test_an_adapter_of_weight_zero_is_dropped_and_said(shared: Shared, name: str) -> None:
    rng = random.Random(1)
    beside = {"ref": "lora/small", "weight": 0.3}
    if name == "lora/small":
        beside = {"ref": "ip/base", "image": "red"}
    idle = {"ref": name, **ways_to_ask(rng)[name], "weight": 0}
    fields = {"prompt": "an apple", "seed": 5, "steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64}
    with_it = shared.running.run([request_for(shared.every, [beside, idle], **fields)])[0]
    without = shared.draw([request_for(shared.every, [beside], **fields)])[0]
    assert (with_it.latents == without).all() or name == "lora/full", "text_weight of its own"
    dropped = [each.ref for each in with_it.done.receipt.dropped]
    assert dropped == ([name] if name != "lora/full" else [])


def test_the_receipt_pins_every_adapter_and_picture(shared: Shared) -> None:
    receipt = shared.running.run([everything(shared.every)])[0].done.receipt
    with Registry.open(shared.running.home) as registry:
        expected = {name: registry.resolve(name).digest for name in ways_to_ask(random.Random(0))}
    assert {each.ref: each.digest for each in receipt.adapters} == expected
    assert set(receipt.request.images) >= {"red", "shape", "blue"}
    assert all(each.digest.startswith("sha256:") for each in receipt.request.images.values())


def test_the_receipt_counts_the_layers_of_each_kind(shared: Shared) -> None:
    ways = ways_to_ask(random.Random(0))
    plain = {"ip/base": {"image": "red"}, "net/t2i": {"image": "shape"}, "net/one": {"image": "shape"}}
    adapters = [{"ref": name, **plain.get(name, ways[name])} for name in ("ip/base", "net/one", "net/t2i", "word/bad")]
    half = [{"ref": "ip/base", "image": "red", "scale": {"up": {"block_1": [0.0, 1.0]}}}]
    fields = {"prompt": "a <bad> apple", "steps": 2, "width": 64, "height": 64}
    whole, part = (
        shared.running.run([request_for(shared.every, asked, **fields)])[0].done.receipt.adapters
        for asked in (adapters, half)
    )
    unet = load_unet(shared.every.files["every/base"])
    crossing = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    counts = {adapter.name: adapter.layers for adapter in whole}
    assert counts["ip/base"] == len(crossing)
    assert part[0].layers == 1
    residuals = 1 + sum(len(block.resnets) + bool(block.downsamplers) for block in unet.down_blocks) + 1
    assert counts["net/one"] == residuals
    assert counts["net/t2i"] == len(unet.down_blocks)
    assert counts["word/bad"] is None


def test_the_receipt_counts_what_networks_and_checkpoints_change(shared: Shared) -> None:
    asked = [{"ref": "dream/dog"}, {"ref": "hyper/context", "weight": 0.5}]
    fields = {"prompt": "an apple", "steps": 2, "width": 64, "height": 64}
    receipt = shared.running.run([request_for(shared.every, asked, **fields)])[0].done.receipt
    counts = {adapter.name: adapter.layers for adapter in receipt.adapters}
    unet = load_unet(shared.every.files["every/base"])
    assert counts["hyper/context"] == len([name for name, _ in unet.named_modules() if name.endswith(".to_k")])
    changed = 0
    for component in ("unet", "text_encoder"):
        of_base, of_checkpoint = (
            load_file(next((shared.every.files[name] / component).glob("*.safetensors")))
            for name in ("every/base", "dream/dog")
        )
        changed += sum(not values.equal(of_base[name]) for name, values in of_checkpoint.items())
    assert counts["dream/dog"] == changed
