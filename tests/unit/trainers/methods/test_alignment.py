"""Tokens of pictures are brought near the words for them before the UNet is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import ENTRIES, make_settings, run_method
from torch import Tensor

from scumble.errors import InvalidRequest
from scumble_trainers.methods.ip_adapter.alignment import Said
from scumble_trainers.methods.ip_adapter.model import IpAdapter
from scumble_trainers.parent import Parent
from scumble_trainers.run import train

TOKENS = 6


def aligned(parent: Parent, things: Path, out: Path, updates: int, **changes: Any) -> IpAdapter:
    """As it is when training begins: its only step is as good as none."""
    still = {"steps": 1, "checkpoint_every": 1, "learning_rate": 1e-2, "warmup": 100, "variant": "plus"}
    method = run_method("ip_adapter", parent, things, out, align=updates, tokens=TOKENS, **still | changes).method
    assert isinstance(method, IpAdapter)
    return method


def distances(method: IpAdapter, texts: list[str]) -> Tensor:
    """`(pictures, texts)` between each picture's tokens and each text's first states."""
    said = Said.read(method.text, texts, TOKENS, method.device)
    with torch.no_grad():
        tokens = method.projection(method.seen.of(torch.arange(6)))
    return torch.cdist(tokens.flatten(1), said.states[said.of].flatten(1))


def own_texts(things: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (things / "metadata.jsonl").read_text("utf-8").splitlines()]


def test_a_picture_lies_nearest_to_its_own_words_whatever_it_is_trained_with(
    parent: Parent, things: Path, tmp_path: Path
) -> None:
    method = aligned(parent, things, tmp_path / "out", 60, captions=("a thing, {style} style",))
    before = aligned(parent, things, tmp_path / "before", 0)
    texts = own_texts(things)
    found = distances(method, texts)
    assert found.diagonal().mean() < 0.5 * distances(before, texts).diagonal().mean()
    assert float((found.argmin(dim=1) == torch.arange(6)).float().mean()) >= 0.5


def test_it_is_a_function_of_the_seed(parent: Parent, things: Path, tmp_path: Path) -> None:
    one, same, other = (
        aligned(parent, things, tmp_path / name, 3, seed=seed).projection.state_dict()
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_four_tokens_do_not_hold_a_caption(parent: Parent, things: Path, tmp_path: Path) -> None:
    settings = make_settings("ip_adapter", align=1, variant="base")
    with pytest.raises(InvalidRequest, match="--variant plus"):
        train(ENTRIES["ip_adapter"].load(), parent, things, tmp_path / "out", settings)
