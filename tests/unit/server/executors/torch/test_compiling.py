"""The compiled denoiser: taken whole, once for each padded structure, and equal to the eager one."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from scumble.errors import Unavailable
from scumble_build.graphs.families import FAMILIES
from scumble_build.graphs.inputs import StepInputs
from scumble_server.denoise.heartbeat import UNKNOWN, StepTimes
from scumble_server.executors.device import structure
from scumble_server.executors.padding import TEXT, Padding, Step
from scumble_server.executors.torch import compiling
from scumble_server.executors.torch.executor import TorchExecutor
from support.paging import some_factors

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step_of(executor: TorchExecutor, rows: int, rank: int, chunks: int = 1, *, full: bool = False) -> Step:
    width = sum(2 * part.width for part in executor.kv_slices)
    sets = list(range(rows))
    factors = some_factors(executor.step_layout, sets, rank, full=full, size=0.05, rows_per_set=1) if rank else None
    text = torch.randn(rows, TEXT * chunks, width)
    return Step(torch.randn(rows, 4, 8, 8), torch.rand(rows), StepInputs(text, factors=factors))


def mix(executor: TorchExecutor, count: int) -> list[Step]:
    """Steps of many sizes, as traffic brings them."""
    rng = random.Random(0)
    return [
        step_of(executor, rng.randint(1, 8), rng.choice([0, 4, 8, 16, 24, 40, 64]), rng.choice([1, 1, 2, 3]))
        for _ in range(count)
    ]


def draw(executor: TorchExecutor, step: Step) -> torch.Tensor:
    return executor.denoise(step.sample, step.timestep, step.inputs)


@pytest.fixture
def eager(tiny_base: Path) -> TorchExecutor:
    torch.manual_seed(0)
    return TorchExecutor.load(tiny_base, FAMILIES["sd1"])


@pytest.mark.parametrize(("rank", "full", "chunks"), [(0, False, 1), (8, True, 3)])
def test_the_denoiser_is_taken_whole(eager: TorchExecutor, rank: int, chunks: int, *, full: bool) -> None:
    step = Padding()(step_of(eager, 3, rank, chunks, full=full))
    with torch.inference_mode():
        explained = torch._dynamo.explain(eager._compute)(step)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("count", [6, pytest.param(30, marks=pytest.mark.compiles)])
def test_a_mix_of_steps_is_compiled_at_most_once_for_each_padded_structure(
    eager: TorchExecutor, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    executor = TorchExecutor.load(tiny_base, FAMILIES["sd1"], compiles=True)
    counter.frame_count = 0
    steps, padding = mix(eager, count), Padding()
    given = {structure(step) for step in steps}
    padded = {structure(padding(step)) for step in steps}
    assert len(given) > len(padded)
    assert count < 30 or len(padded) > 8  # torch's own limit, after which nothing is compiled
    for step in steps:
        assert torch.allclose(draw(executor, step), draw(eager, step), atol=TOLERANCE)
    assert 0 < counter.frame_count <= len(padded)
    known = counter.frame_count
    for step in steps:
        draw(executor, step)
    assert counter.frame_count == known
    _of_another_checkpoint(executor, eager, steps[0])


def _of_another_checkpoint(executor: TorchExecutor, eager: TorchExecutor, step: Step) -> None:
    """Another checkpoint has its own weights in the compiled code."""
    name = "mid_block.attentions.0.proj_in.weight"
    changed = {"unet": {name: eager.weight(f"unet.{name.removesuffix('.weight')}") * 0.5}}
    variant, expected = executor.variant(changed), eager.variant(changed)
    assert torch.allclose(draw(variant, step), draw(expected, step), atol=TOLERANCE)
    assert not torch.allclose(draw(variant, step), draw(executor, step), atol=TOLERANCE)


@pytest.mark.compiles
def test_what_inductor_makes_draws_what_eager_torch_draws(eager: TorchExecutor, tiny_base: Path) -> None:
    executor = TorchExecutor.load(tiny_base, FAMILIES["sd1"], compiles=True)
    step = step_of(eager, 3, 8)
    assert torch.allclose(draw(executor, step), draw(eager, step), atol=TOLERANCE)


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_machine_that_cannot_compile_is_told_at_the_start(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    if fault == "missing":
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    else:
        monkeypatch.setattr(compiling, "_doubled", _unequal())
    with pytest.raises(Unavailable, match="--compile"):
        TorchExecutor.load(tiny_base, FAMILIES["sd1"], compiles=True)


def _unequal() -> Any:
    """A function that differs each time, as one that is compiled wrongly would."""
    calls = iter(range(10))
    return torch._dynamo.disable(lambda values: values + next(calls))


def test_a_step_that_may_compile_is_given_time() -> None:
    plain, patient = StepTimes(), StepTimes(UNKNOWN)
    for times in (plain, patient):
        times.took("a", 0.5)
    assert (plain.expected("a"), patient.expected("a")) == (0.5, UNKNOWN)
