"""Captures, streams and lost devices: what can be said of them without a GPU, with torch.cuda played by a record."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scumble.errors import OutOfMemory
from scumble_server.executors import cuda
from scumble_server.executors.cuda import CudaCapture, alone, is_lost, own_stream, ran_out_of_memory
from scumble_server.executors.device import Graphs, faults, structure
from support.fake_tensorrt import StrictCapture

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class FakeCuda:
    """The part of torch.cuda that is called, as a record of calls. `fails` is raised at the end of a capture."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pools = 0
        self.fails: Exception | None = None
        self.lost = False
        recorded = self

        class CUDAGraph:
            def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                recorded.calls.append(f"begin in pool {pool}")

            def capture_end(self) -> None:
                recorded.calls.append("end")
                if recorded.fails is not None:
                    raise recorded.fails

            def replay(self) -> None:
                recorded.calls.append("replay")

        self.CUDAGraph = CUDAGraph

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def is_available(self) -> bool:
        return True

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def current_stream(self, _device: object = None) -> Any:
        def synchronize() -> None:
            self.calls.append("wait")
            if self.lost:
                raise torch.AcceleratorError(ILLEGAL)

        return SimpleNamespace(synchronize=synchronize, cuda_stream=7)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    monkeypatch.setattr(torch, "cuda", made)
    return made


def test_a_capture_begins_when_the_stream_is_idle_and_no_collection_runs_in_it(fake: FakeCuda) -> None:
    states: list[bool] = []
    replay = CudaCapture()(lambda: states.append(gc.isenabled()) or "result")
    assert fake.calls == ["wait", "begin in pool 1", "end"]
    assert states == [False]
    assert gc.isenabled()
    assert replay() == "result"
    assert fake.calls[-1] == "replay"


def test_graphs_share_a_pool_which_is_never_used_again_once_its_last_graph_is_gone(fake: FakeCuda) -> None:
    capture = CudaCapture()
    replays = [capture(lambda: None), capture(lambda: None)]
    replays.clear()
    gc.collect()
    capture(lambda: None)
    assert [call for call in fake.calls if call.startswith("begin")] == [
        "begin in pool 1", "begin in pool 1", "begin in pool 2"
    ]  # fmt: skip


def test_a_capture_that_fails_is_ended_and_its_own_error_is_told(fake: FakeCuda) -> None:
    fake.fails = RuntimeError("capture was invalidated")

    def work() -> None:
        raise ValueError("not this")

    with pytest.raises(ValueError, match="not this"):
        CudaCapture()(work)
    assert fake.calls[-1] == "end"
    assert gc.isenabled()


def test_steps_go_on_without_graphs_where_one_cannot_be_captured_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts = []

    def capture(work: Callable[[], Any]) -> Callable[[], Any]:
        attempts.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs(capture)
    with caplog.at_level(logging.WARNING):
        assert [graphs.run("key", lambda: "drawn") for _ in range(4)] == ["drawn"] * 4
        assert graphs.run("other", lambda: "drawn too") == "drawn too"
    assert len(attempts) == 1
    assert caplog.text.count("operation not permitted") == 1


def test_memory_that_runs_out_in_a_capture_is_no_reason_to_do_without_graphs() -> None:
    room = False

    def capture(work: Callable[[], Any]) -> Callable[[], Any]:
        if not room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work

    graphs = Graphs(capture)
    graphs.run("key", int)
    with pytest.raises(OutOfMemory), faults("a step"):
        graphs.run("key", int)
    room = True
    graphs.run("key", int)
    assert graphs.captured == 1


def test_nothing_is_captured_where_graphs_are_off_or_work_cannot_be() -> None:
    off, on = Graphs(None), Graphs(StrictCapture())
    for _ in range(3):
        assert off.run("key", lambda: 1) == 1
        assert on.run("key", lambda: 2, to_capture=lambda: None) == 2
    assert off.captured == on.captured == 0


def test_one_thread_at_a_time_captures_or_loads() -> None:
    """The stand-in for captures raises if two overlap."""
    capture, began, go = StrictCapture(), threading.Event(), threading.Event()
    first, second = Graphs(capture), Graphs(capture)

    def slow() -> None:
        began.set()
        assert go.wait(10)

    first.run("key", int)
    second.run("key", int)
    loaded = threading.Event()

    def load() -> None:
        with alone():
            loaded.set()

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(first.run, "key", slow)]
        assert began.wait(10)
        running += [threads.submit(second.run, "key", int), threads.submit(load)]
        assert not loaded.wait(0.05)
        go.set()
        for each in running:
            each.result()
    assert loaded.is_set()
    assert capture.captures == 2


def test_graphs_are_dropped_from_other_threads_while_steps_run() -> None:
    graphs = Graphs(lambda work: work, most=8)
    ended = threading.Event()
    owners = [object() for _ in range(4)]

    def drop() -> None:
        while not ended.is_set():
            for owner in owners:
                graphs.drop(owner)
                graphs.keys()

    with ThreadPoolExecutor() as threads:
        dropping = threads.submit(drop)
        for turn in range(4000):
            assert graphs.run((owners[turn % 4], turn % 16), lambda: 5) == 5
        ended.set()
        dropping.result()


def test_a_graph_that_is_dropped_within_a_capture_is_freed_after_it() -> None:
    class Replay:
        def __call__(self) -> None: ...

    made: list[weakref.ref[Replay]] = []

    def capture(work: Callable[[], Any]) -> Replay:
        work()
        replay = Replay()
        made.append(weakref.ref(replay))
        return replay

    graphs, owner = Graphs(capture), object()
    freed_in_capture: list[bool] = []

    def work() -> None:
        graphs.drop(owner)
        freed_in_capture.append(made[0]() is None)

    for _ in range(2):
        graphs.run((owner, 1), int)
    graphs.run("other", int)
    graphs.run("other", work)
    assert freed_in_capture == [False]
    assert made[0]() is None


def test_a_key_knows_modules_by_themselves_without_keeping_them() -> None:
    module = torch.nn.Linear(1, 1)
    key = structure((module, 1))
    assert key == structure((module, 1)) != structure((torch.nn.Linear(1, 1), 1))
    gone = weakref.ref(module)
    del module
    assert gone() is None
    assert key != structure((torch.nn.Linear(1, 1), 1))


@pytest.mark.parametrize("value", [[torch.ones(1)], {1}, object()])
def test_what_may_hold_memory_unseen_is_no_part_of_a_key(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be an input of a captured step"):
        structure((value,))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_what_libraries_say_of_memory_is_known_and_ends_no_process(fake: FakeCuda, error: Exception) -> None:
    assert ran_out_of_memory(error)
    assert not is_lost(error, "cuda")
    with pytest.raises(OutOfMemory), faults("a step"):
        raise error
    assert fake.calls[-1] == "empty_cache"


def test_a_device_is_lost_if_the_error_or_the_stream_says_so(fake: FakeCuda) -> None:
    assert is_lost(torch.AcceleratorError(ILLEGAL), "cuda")
    assert not is_lost(RuntimeError("shapes differ"), "cuda")
    fake.lost = True
    assert is_lost(RuntimeError("TensorRT: a run failed"), "cuda")
    assert not is_lost(RuntimeError("shapes differ"), "cpu")


def test_each_thread_has_a_stream_of_its_own(fake: FakeCuda) -> None:
    made: list[tuple[str, int]] = []
    within: list[object] = []

    @contextmanager
    def stream(which: object) -> Iterator[None]:
        within.append(which)
        yield

    fake.Stream = lambda device, priority: made.append((device.type, priority)) or len(made)  # type: ignore[attr-defined]
    fake.stream = stream  # type: ignore[attr-defined]
    with own_stream("cuda"), own_stream("cuda", urgent=True), own_stream("cpu"):
        assert within == [1, 2]
    assert made == [("cuda", 0), ("cuda", -1)]
    assert cuda.stream_handle(torch.device("cuda")) == 7
