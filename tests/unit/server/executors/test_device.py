"""Buffers, graphs and uploads: what can be said of them without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scumble.errors import OutOfMemory
from scumble.request import Adapter, Request
from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import LiteInputs, StepInputs
from scumble_build.graphs.lllite import LLLite
from scumble_server.executors import device
from scumble_server.executors.device import Buffers, Captured, Graphs, Stepping, Uploads
from scumble_server.executors.torch.executor import TorchExecutor, _computing

Running = Any
CPU = torch.device("cpu")


def inputs(rows: int = 2, rank: int = 8, *, factors: bool = True) -> StepInputs:
    pages = Pages(torch.randn(3, 6), torch.randn(3, 5), torch.ones(rows, rank // 8, dtype=torch.int64))
    carried = Factors(pages, None, torch.ones(rows, rank), rows_per_set=rows) if factors else None
    return StepInputs(torch.randn(rows, 3, 4), None, carried, residuals=(torch.randn(rows, 2), torch.randn(rows, 1)))


def test_a_buffer_stays_at_its_address_until_more_is_asked_of_it() -> None:
    buffers = Buffers(CPU)
    first = buffers.take("kv", (4, 8), torch.float32)
    smaller = buffers.take("kv", (2, 8), torch.float32)
    other = buffers.take("kv", (4, 16), torch.float16)
    assert first.data_ptr() == smaller.data_ptr() == other.data_ptr()
    assert buffers.allocations == 1
    buffers.take("kv", (400, 8), torch.float32)
    assert buffers.allocations == 2
    assert buffers.nbytes >= 400 * 8 * 4


def test_what_did_not_change_is_not_copied_again_and_what_did_is() -> None:
    buffers = Buffers(CPU)
    values = torch.ones(3)
    view = buffers.fill("x", values)
    view.zero_()
    assert buffers.fill("x", values).sum() == 0
    assert buffers.fill("x", torch.ones(3)).sum() == 3
    assert buffers.fill("x", torch.ones(3), torch.float16).dtype == torch.float16


def test_a_buffer_that_was_made_anew_is_filled_again() -> None:
    buffers = Buffers(CPU)
    values = torch.ones(3)
    buffers.fill("x", values)
    buffers.reserve("x", 4096)
    assert buffers.fill("x", values).sum() == 3


def test_a_pool_is_read_where_it_is() -> None:
    buffers = Buffers(CPU)
    pool = torch.nn.Buffer(torch.ones(3), persistent=False)
    assert buffers.fill("x", pool) is pool
    assert buffers.fill("x", pool, torch.float16).dtype == torch.float16
    assert buffers.allocations == 1


def test_structures_are_equal_where_a_graph_can_be_shared() -> None:
    assert device.structure(inputs()) == device.structure(inputs())
    others = [inputs(rows=4), inputs(rank=16), inputs(factors=False)]
    assert len({device.structure(each) for each in [inputs(), *others]}) == 4


@dataclass
class Taping:
    """A capture that counts its replays."""

    replays: int = 0

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        def replay() -> Any:
            self.replays += 1
            return work()

        return replay


@dataclass
class Step:
    stepping: Stepping = field(default_factory=lambda: Stepping(Buffers(CPU), Graphs(Taping(), most=2)))

    def __post_init__(self) -> None:
        self.captured = Captured(self.stepping, compute)

    @property
    def buffers(self) -> Buffers:
        return self.stepping.buffers

    @property
    def graphs(self) -> Graphs:
        return self.stepping.graphs


def compute(record: StepInputs) -> Tensor:
    total = record.kv.sum() * 2
    return total if record.factors is None else total + record.factors.small.A.sum()


def sum_of_pictures(record: StepInputs) -> Tensor:
    return record.lites[0].embeddings["to_q"].sum()


def test_a_replayed_step_reads_this_requests_control_picture_not_the_captured_ones() -> None:
    stepping = Stepping(Buffers(CPU), Graphs(Taping()))
    captured = Captured(stepping, sum_of_pictures)
    kv, net = torch.randn(1, 3, 4), LLLite({})
    for value in (1.0, 2.0, 3.0):
        lite = LiteInputs(torch.tensor([0]), net, {"to_q": torch.full((1, 2, 3), value)}, torch.ones(1))
        assert captured(StepInputs(kv, lites=(lite,))) == 6 * value
    assert stepping.graphs.captured == 1


def test_a_step_of_a_known_structure_is_replayed_with_new_values_and_allocates_nothing() -> None:
    step = Step()
    for _ in range(4):
        record = inputs()
        expected = compute(record)
        allocations = step.buffers.allocations
        assert torch.allclose(step.captured(record), expected)
    assert step.graphs.captured == 1, "the first time it runs as it is, the second time it is captured"
    assert step.buffers.allocations == allocations == 7


def test_another_structure_is_another_graph_and_the_oldest_goes() -> None:
    step = Step()
    records = [inputs(), inputs(factors=False), inputs(rows=1)]
    for record in [*records, *records, *records]:
        assert torch.allclose(step.captured(record), compute(record))
    assert step.graphs.captured == 6
    assert len(step.graphs.keys()) == 2


def test_a_buffer_at_a_new_address_is_another_graph() -> None:
    step = Step()
    small, large = inputs(), inputs(rows=64, rank=64)
    for record in (small, small, large, large, small, small):
        assert torch.allclose(step.captured(record), compute(record))
    assert step.graphs.captured == 3
    step.captured(small)
    assert step.graphs.captured == 3


def test_executors_share_buffers_but_never_graphs_and_take_theirs_with_them() -> None:
    step = Step()
    twice = Captured(step.stepping, lambda record: compute(record) * 2)
    record = inputs()
    for _ in range(2):
        assert torch.allclose(step.captured(record) * 2, twice(record))
    assert step.buffers.allocations == 7
    assert step.graphs.captured == len(step.graphs.keys()) == 2
    del twice
    assert len(step.graphs.keys()) == 1


def test_uploads_arrive_in_the_precision_that_was_asked_for() -> None:
    A, slot = Uploads(CPU).send(torch.ones(2, 3), torch.zeros(1, dtype=torch.int64))
    assert (A.dtype, slot.dtype) == (torch.float32, torch.int64)
    assert Uploads(CPU).send(torch.ones(2), dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_what_torch_says_of_memory_is_typed(error: Exception) -> None:
    with pytest.raises(OutOfMemory, match="a smaller picture"), device.faults("a step"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), device.faults("a step"):
        raise RuntimeError("shapes differ")


def test_a_real_allocation_that_cannot_be_is_typed() -> None:
    with pytest.raises(OutOfMemory):
        Buffers(CPU).reserve("x", 1 << 50)


def test_strangers_are_drawn_alike_in_buffers_and_graphs_and_without(
    running: Running, published: tuple[Path, dict[str, Path]], start: Callable[..., Running]
) -> None:
    """The torch executor as it is on CUDA, with a capture that captures nothing."""
    home, files = published
    captured = start(home, "tiny/base", files)
    executor = captured.executor
    assert isinstance(executor, TorchExecutor)
    stepping = Stepping(Buffers(CPU), Graphs(Taping()))
    executor._captured = Captured(stepping, _computing(executor.graphs.denoiser))
    executor._padding = lambda step: step  # type: ignore[assignment]  # it rounds otherwise: test_padding.py
    requests = [
        Request(prompt="a", adapters=(Adapter(ref="l/a"),), steps=4, width=64, height=64, seed=1),
        Request(prompt="b c", adapters=(Adapter(ref="l/full", weight=0.5),), steps=3, width=64, height=64, seed=2),
        Request(prompt="d", steps=4, width=64, height=64, seed=3),
        Request(
            prompt="e",
            adapters=(
                Adapter(ref="l/a"),
                Adapter(ref="l/b", end=0.5),
            ),
            steps=4,
            width=64,
            height=64,
            seed=4,
        ),
    ]
    try:
        for request in requests:  # alone, so that both services compute the same batches
            (plain,), (replayed,) = running.run([request]), captured.run([request])
            assert torch.equal(plain.latents, replayed.latents)
        together = captured.run(requests)
        for request, found in zip(requests, together, strict=True):
            assert torch.allclose(found.latents, running.run([request])[0].latents, atol=1e-4)
    finally:
        captured.service.close()
    assert 0 < stepping.graphs.captured < sum(request.steps or 0 for request in requests)
