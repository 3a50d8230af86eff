"""The receipt counts the layers that a LoRA is bound to; one that changes nothing is told as dropped, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scumble.request import Adapter, Request
from scumble_registry import Registry

if TYPE_CHECKING:
    from support.running import Running

LORA = "pytorch_lora_weights.safetensors"


def request(*adapters: Adapter) -> Request:
    return Request(prompt="a", adapters=adapters, steps=2, width=64, height=64, seed=1)


def layers_of(file: Path) -> int:
    return len({name.partition(".lora_")[0] for name in load_file(file) if ".lora_" in name})


@pytest.fixture(scope="module")
def zeros(
    tiny_base: Path, make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A LoRA whose `up` are all zero, as before a training; and one in which half of them are."""
    folder = tmp_path_factory.mktemp("zeros")
    tensors = load_file(make_lora(tiny_base, folder / "lora", seed=1))
    ups = sorted(name for name in tensors if "lora_B" in name)
    for name, gone in (("all", ups), ("half", ups[::2])):
        (folder / name).mkdir()
        save_file(tensors | {key: torch.zeros_like(tensors[key]) for key in gone}, folder / name / LORA)
    return folder / "all" / LORA, folder / "half" / LORA


@pytest.fixture(scope="module")
def drawn(
    tiny_base: Path, zeros: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("layers")
    with Registry.open(home, create=True) as registry:
        registry.publish(tiny_base, "tiny/base")
        for name, file in zip(("l/zero", "l/half"), zeros, strict=True):
            registry.publish(file, name)
    running = start(home, "tiny/base", {"base": tiny_base})
    yield running
    running.service.close()


@pytest.mark.parametrize(("name", "kind"), [("l/a", {}), ("l/plain", {}), ("l/full", {})])
def test_the_receipt_counts_the_layers_of_the_file(running: Running, name: str, kind: dict[str, Any]) -> None:
    (bound,) = running.run([request(Adapter(ref=name, **kind))])[0].done.receipt.adapters
    assert bound.layers == layers_of(running.files[name])


def test_blocks_of_weight_zero_are_not_counted(running: Running) -> None:
    whole, middle = (
        running.run([request(Adapter(ref="l/plain", blocks=blocks))])[0].done.receipt.adapters[0].layers
        for blocks in (None, {"mid_block": 0.0})
    )
    assert whole is not None
    assert middle is not None
    names = {name.partition(".lora_")[0] for name in load_file(running.files["l/plain"])}
    assert whole - middle == sum(".mid_block." in name for name in names) > 0


def test_layers_that_are_zero_are_not_counted(drawn: Running, zeros: tuple[Path, Path]) -> None:
    (bound,) = drawn.run([request(Adapter(ref="l/half"))])[0].done.receipt.adapters
    assert bound.layers == layers_of(zeros[1]) - len([n for n in load_file(zeros[1]) if "lora_B" in n][::2])


def test_what_is_merged_into_weights_is_counted_too(running: Running) -> None:
    """Together they need more rank columns than factors hold."""
    many = [Adapter(ref="l/plain", weight=0.1 + index / 100) for index in range(8)]
    bound = running.run([request(*many)])[0].done.receipt.adapters
    assert {adapter.layers for adapter in bound} == {layers_of(running.files["l/plain"])}


def test_a_lora_that_changes_nothing_is_dropped_with_the_reason(drawn: Running) -> None:
    result = drawn.run([request(Adapter(ref="l/zero"), Adapter(ref="l/half"))])[0]
    (dropped,) = result.done.receipt.dropped
    assert (dropped.ref, dropped.reason) == ("l/zero", "every change in it is zero")
    assert torch.equal(result.latents, drawn.run([request(Adapter(ref="l/half"))])[0].latents)


def test_blocks_that_leave_nothing_are_told(running: Running) -> None:
    blocks = dict.fromkeys(("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"), 0.0)
    (dropped,) = running.run([request(Adapter(ref="l/plain", blocks=blocks))])[0].done.receipt.dropped
    assert dropped.reason == "the weights of all blocks that it changes are 0"
