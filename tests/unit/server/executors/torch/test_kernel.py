"""The fused kernel of LoRAs equals batched products in Triton's interpreter; where it is used, and what if it fails."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scumble.errors import OutOfMemory, Unavailable
from scumble_build.graphs.adapted import Adapted, FactorInput, PagesOfLayer, layout_of
from scumble_build.graphs.families import FAMILIES
from scumble_server.executors.device import faults
from scumble_server.executors.torch import kernel as module
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


def test_the_kernel_is_used_on_cuda_where_its_language_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = lambda: lambda _x, _y, _read: None  # noqa: E731
    monkeypatch.setattr(module, "_load", loaded)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else None)
    assert choose_kernel(CPU) is None
    assert choose_kernel(CUDA, asked=False) is None
    assert isinstance(choose_kernel(CUDA), FusedKernel)
    assert isinstance(choose_kernel(CUDA, asked=True), FusedKernel)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose_kernel(CUDA) is None
    with pytest.raises(Unavailable, match="package `triton`"):
        choose_kernel(CUDA, asked=True)
    with pytest.raises(Unavailable, match="--device cuda"):
        choose_kernel(CPU, asked=True)


def test_every_graph_of_an_executor_and_its_variants_uses_the_kernel(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FusedKernel(lambda _x, _y, _read: None)
    monkeypatch.setattr("scumble_server.executors.torch.executor.choose_kernel", lambda *_, **__: kernel)
    executor = TorchExecutor.load(tiny_base, FAMILIES["sd1"])
    for graphs in (executor.graphs, executor.variant({}).graphs):
        for graph in (graphs.denoiser, graphs.projection, *graphs.texts.values()):
            assert graph.source.kernel is kernel
