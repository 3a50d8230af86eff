"""What holds for all six: they learn on every family, leave the base alone, publish, and survive being killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble_registry import Registry
from scumble_registry.results import publish_result
from scumble_trainers.base import TrainingBase, find_base
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run
from support.every_method import ENTRIES, make_settings, run_method

METHODS = sorted(ENTRIES)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_it_is_trained_for_every_family_and_published_as_what_it_is(
    any_folder: Path, things: Path, tmp_path: Path, method: str
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    with Registry.open(home, create=True) as registry:
        registry.publish(any_folder, "tiny/base")
    before = content(any_folder)
    run = run_method(method, find_base("tiny/base", home), things, out)

    moved = [name for name, value in run.method.trained().items() if value.grad is None or value.grad.abs().max() > 0]
    assert run.metrics["before"]["training_loss"] != run.metrics["after"]["training_loss"]
    assert len(moved) > len(run.method.trained()) / 2
    assert content(any_folder) == before
    with Registry.open(home) as registry:
        version = publish_result(registry, out, "things/disc", base="tiny/base", alias="staging")
        assert registry.resolve("things/disc@staging").ref == version.ref == "things/disc@1"
    manifest = version.manifest
    assert manifest.kind == method
    assert manifest.provenance is not None
    assert manifest.provenance["trainer"] == method
    assert manifest.provenance["parent"] == find_base("tiny/base", home).digest


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_on_what_it_sees_falls(base: TrainingBase, things: Path, tmp_path: Path, method: str) -> None:
    run = run_method(method, base, things, tmp_path / "out", steps=40, checkpoint_every=40, caption_dropout=0.0)
    assert run.metrics["after"]["training_loss"] < 0.99 * run.metrics["before"]["training_loss"]


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one(
    base: TrainingBase, things: Path, tmp_path: Path, method: str
) -> None:
    def kill_at_step_3(stage: str, done: int, *_: object) -> None:
        if stage == "training" and done == 3:
            raise Killed

    kind, settings = ENTRIES[method].load(), make_settings(method)
    with pytest.raises(Killed):
        train(kind, base, things, tmp_path / "killed", settings, report=kill_at_step_3)
    steps: list[int] = []

    def count(stage: str, done: int, *_: Any) -> None:
        if stage == "training":
            steps.append(done)

    resumed = train(kind, base, things, tmp_path / "killed", settings, report=count)
    whole = train(kind, base, things, tmp_path / "whole", settings)
    assert steps == [3, 4]
    assert resumed.metrics == whole.metrics
    killed, uninterrupted = (place / resumed.adapter for place in (tmp_path / "killed", tmp_path / "whole"))
    if killed.is_file():
        assert killed.read_bytes() == uninterrupted.read_bytes()
    else:
        assert content(killed) == content(uninterrupted)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_in_parts_trains_the_same(base: TrainingBase, things: Path, tmp_path: Path, method: str) -> None:
    whole = run_method(method, base, things, tmp_path / "whole", steps=2)
    parts = run_method(
        method, base, things, tmp_path / "parts", steps=2, accumulate=2, gradient_checkpointing=True, ema=0.5
    )
    for (name, one), other in zip(whole.method.trained().items(), parts.method.trained().values(), strict=True):
        # Adam's first steps are ± the learning rate however small the gradient is, so signs of noise differ.
        assert torch.quantile((one - other).abs().flatten()[:100_000], 0.9) < 2e-3, name


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_short_and_long_captions_has_each_ones_own_loss(
    base: TrainingBase, things: Path, tmp_path: Path, prepare: Callable[..., Run], method: str
) -> None:
    lines = [json.loads(line) for line in (things / "metadata.jsonl").read_text("utf-8").splitlines()]
    for number, line in enumerate(lines):
        line["text"] += " and so on" * (3 * (number % 2))  # 24 tokens are read at once
    (things / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    prompts = (lines[0]["text"], lines[1]["text"])
    settings = make_settings(method, caption_dropout=0.3, batch_size=6, prompts=prompts)
    run = prepare(ENTRIES[method].load(), base, things, tmp_path / "out", settings)

    captions, draw = run.method.material.captions, run._draw()
    lengths = captions.chunks[captions.choose(draw.pictures, draw.captions)]
    assert len(lengths.unique()) > 1
    with torch.no_grad():
        together = run.method(draw)
        alone = torch.stack([run.method(draw.at(torch.tensor([place]))) for place in range(6)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-4, atol=1e-5)
    assert len(run.method.draw(run.method.material.samples)) == 2
