"""The fused kernel of LoRAs equals batched products in Triton's interpreter; where it is used, and what if it fails."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from scumble.errors import OutOfMemory, Unavailable
from scumble_build.graphs.adapted import Adapted, FactorInput, Factors, PagesOfLayer, layout_of, pages_of
from scumble_build.graphs.families import FAMILIES
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.executors.choice import load_executor
from scumble_server.executors.device import faults
from scumble_server.executors.torch.executor import TorchExecutor
from scumble_server.executors.torch.kernel import FusedKernel, choose_kernel
from support.paging import some_factors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SUPPORT = Path(__file__).parents[4] / "support"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_it_equals_batched_products_at_every_rank_grouping_and_precision() -> None:
    run = subprocess.run(
        [sys.executable, SUPPORT / "fused_kernel.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(SUPPORT.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    cases = [json.loads(line) for line in run.stdout.splitlines()]
    assert {case["case"][0] for case in cases} == {8, 16, 32, 64, 128, 256}
    assert {case["case"][3] for case in cases} == {"fp32", "fp16", "bf16"}
    for case in cases:
        assert case["fused"], case
        assert case["error"] <= case["allowed"], case
        assert case["added"] > 10 * case["allowed"], case
        assert case["bare"] == 0, case


def adapted() -> tuple[Adapted, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 10).requires_grad_(False)
    layout = layout_of({"unet.attentions.it": layer})
    source = FactorInput(some_factors(layout, [0, 1], 8))
    return Adapted(layer, layout.targets["unet.attentions.it"], source), torch.randn(3, 4, 6)


def test_a_kernel_that_fails_is_not_tried_again_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def add(_x: Tensor, _y: Tensor, _read: PagesOfLayer) -> None:
        calls.append(1)
        raise ValueError("no such instruction")

    layer, x = adapted()
    expected = layer(x)
    layer.source.kernel = FusedKernel(add)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert len(calls) == 1
    assert "without the fused kernel" in caplog.text
    assert "no such instruction" in caplog.text


def test_memory_that_runs_out_is_no_failure_of_the_kernel() -> None:
    def add(_x: Tensor, _y: Tensor, _read: PagesOfLayer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layer, x = adapted()
    layer.source.kernel = kernel = FusedKernel(add)
    with pytest.raises(OutOfMemory), faults("a step"):
        layer(x)
    assert kernel.works


def test_the_kernel_is_used_on_cuda_where_its_language_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = "scumble_server.executors.torch.paged_lora"
    stand_in = ModuleType(place)
    stand_in.__dict__["add_paged"] = lambda _x, _y, _read: None
    monkeypatch.setitem(sys.modules, place, stand_in)
    assert choose_kernel(CPU) is None
    assert choose_kernel(CUDA, asked=False) is None
    assert isinstance(choose_kernel(CUDA), FusedKernel)
    assert isinstance(choose_kernel(CUDA, asked=True), FusedKernel)
    assert not caplog.messages
    monkeypatch.delitem(sys.modules, place)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises
    assert choose_kernel(CUDA) is None
    assert "package `triton`" in caplog.text
    with pytest.raises(Unavailable, match="package `triton`"):
        choose_kernel(CUDA, asked=True)
    with pytest.raises(Unavailable, match="--device cuda"):
        choose_kernel(CPU, asked=True)


def test_an_output_with_gaps_is_not_added_to() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from scumble_server.executors.torch.paged_lora import add_paged

    layer, x = adapted()
    expected = layer(x)
    kernel = FusedKernel(add_paged)
    assert isinstance(layer.source.factors, Factors)
    y = torch.zeros(3, 10, 4).transpose(1, 2)
    assert not kernel(x, y, pages_of(layer.target, layer.source.factors))
    assert not y.any()
    layer.source.kernel = kernel
    assert torch.equal(layer(x), expected)


def test_a_server_that_is_asked_for_the_kernel_says_what_it_lacks(published: tuple[Path, dict[str, Path]]) -> None:
    config = ServerConfig(home=published[0], base="tiny/base", executor="torch", fused_lora=True)
    with (
        Registry.open(published[0]) as registry,
        pytest.raises(Unavailable, match=r"fused kernel.*--device cuda.*--fused-lora"),
    ):
        load_executor(registry, registry.resolve("tiny/base"), FAMILIES["sd1"], config)


def test_every_graph_of_an_executor_and_its_variants_uses_the_kernel(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FusedKernel(lambda _x, _y, _read: None)
    monkeypatch.setattr("scumble_server.executors.torch.executor.choose_kernel", lambda *_, **__: kernel)
    executor = TorchExecutor.load(tiny_base, FAMILIES["sd1"])
    for graphs in (executor.graphs, executor.variant({}).graphs):
        for graph in (graphs.denoiser, graphs.projection, *graphs.texts.values()):
            assert graph.source.kernel is kernel
