"""Common steps are captured before the first request, and what comes then is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_server import service as service_module
from scumble_server.config import ServerConfig
from scumble_server.denoise.heartbeat import UNKNOWN
from scumble_server.denoise.warm_up import warm_up
from scumble_server.executors.device import Buffers, Captured, Graphs, Stepping
from scumble_server.executors.protocol import Executor
from scumble_server.executors.torch.executor import TorchExecutor, _computing
from scumble_server.memory.pages import Pools
from scumble_server.service import Service
from support.fake_tensorrt import StrictCapture
from support.running import Running
from support.tiny_families import make_tiny_sdxl

CPU = torch.device("cpu")


@pytest.fixture
def served(published: tuple[Path, dict[str, Path]], start: Callable[..., Running]) -> Iterator[Running]:
    home, files = published
    running = start(home, "tiny/base", files, executor="torch")
    yield running
    running.service.close()


def capturing(executor: Executor) -> Graphs:
    """Make the executor capture; returns what counts its captures."""
    assert isinstance(executor, TorchExecutor)
    graphs = Graphs(StrictCapture())
    executor._captured = Captured(Stepping(Buffers(CPU), graphs), _computing(executor.graphs.denoiser))
    return graphs


def ask(images: int = 1, **fields: Any) -> Request:
    return Request(
        **{"prompt": "a boat", "steps": 4, "width": 64, "height": 64, "seed": 1, "num_images": images, **fields}
    )


def test_requests_as_most_ask_them_capture_nothing_any_more(served: Running) -> None:
    service, graphs = served.service, capturing(served.executor)
    count = warm_up(service.bases[0], served.executor, service._pools, max_images=8)
    assert count == graphs.captured == 3 * 4 - 1, "one image has no strangers"
    for images in (1, 2, 3, 4):
        served.run([ask(images)])
        served.run([ask(images, adapters=(Adapter(ref="l/a"),))])
    assert graphs.captured == count
    served.run([ask(adapters=(Adapter(ref="l/full"),))])
    assert graphs.captured == count + 1, "the full layout is another structure"


def test_the_buffers_have_their_largest_size_from_the_first_step_on(served: Running) -> None:
    graphs, service = capturing(served.executor), served.service
    for _ in range(2):
        warm_up(service.bases[0], served.executor, service._pools, max_images=8)
    assert graphs.captured == 11


@pytest.mark.parametrize(("max_images", "max_rows", "steps"), [(4, 32, 8), (8, 4, 5), (1, 32, 2)])
def test_no_step_is_larger_than_one_can_be(served: Running, max_images: int, max_rows: int, steps: int) -> None:
    executor = served.executor
    assert isinstance(executor, TorchExecutor)
    graphs = capturing(executor)
    executor.max_rows = max_rows
    assert warm_up(served.service.bases[0], executor, Pools(), max_images) == steps == graphs.captured


def test_a_base_that_reads_sizes_is_warmed_up_too(tmp_path: Path, start: Callable[..., Running]) -> None:
    base = make_tiny_sdxl(tmp_path / "base")
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(base, name="tiny/xl")
    running = start(tmp_path / "home", "tiny/xl", {}, executor="torch")
    try:
        graphs = capturing(running.executor)
        count = warm_up(running.service.bases[0], running.executor, running.service._pools, max_images=2)
        running.run([ask(2)])
        assert graphs.captured == count == 5
    finally:
        running.service.close()


@pytest.mark.parametrize(("device", "graphs", "calls"), [("cuda", True, 1), ("cuda", False, 0), ("cpu", True, 0)])
def test_a_server_warms_up_where_graphs_are_captured_and_serves_even_if_that_fails(
    published: tuple[Path, dict[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
    calls: int,
    *,
    graphs: bool,
) -> None:
    """The device is named after the start, so that all is computed on the CPU."""
    asked: list[int] = []
    beats: list[float] = []

    def failing(*arguments: Any, before_each: Callable[[], object]) -> int:
        asked.append(arguments[-1])
        before_each()
        raise RuntimeError("nothing can be captured")

    config = ServerConfig(home=published[0], base="tiny/base", executor="torch", cuda_graphs=graphs, max_batch_images=5)
    service = Service.open(config)
    try:
        with monkeypatch.context() as patches:
            patches.setattr(service_module, "warm_up", failing)
            patches.setattr(service_module, "is_lost", lambda *_: False)
            patches.setattr(service._loop, "run", lambda: None)
            patches.setattr(service, "_heartbeat", beats.append)
            patches.setattr(service, "_config", config.model_copy(update={"device": device}))
            service._draw_all()
        assert asked == [5] * calls
        assert beats == [UNKNOWN] * calls
        assert ("nothing can be captured" in caplog.text) == bool(calls)
    finally:
        service.close()
