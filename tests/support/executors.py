"""Every executor over one base, opened in the same way, with what it needs to run variants and ControlNets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scumble_build.engines.store import Pulled
from scumble_build.export.control import NetGraphs
from scumble_build.export.manifest import Precision
from scumble_build.export.plan import component_of
from scumble_build.graphs.families import FAMILIES
from scumble_registry import Version
from scumble_registry.compatibility import Family
from scumble_server.executors.device import Buffers, Graphs, Stepping
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.protocol import Changed, Executor, NetModel, Nets
from scumble_server.executors.tensorrt.engines import EngineRuntime, Engines
from scumble_server.executors.tensorrt.executor import TensorRTExecutor
from scumble_server.executors.torch.executor import PRECISION_OF, TorchExecutor
from support.engines import make_engines
from support.fake_tensorrt import FakeTensorRT, StrictCapture

EXECUTORS = ("torch", "onnxruntime", "tensorrt")
EXPORTED = EXECUTORS[1:]
"""Those that run exported graphs; torch is their oracle."""


@dataclass(frozen=True)
class Opened:
    """An executor; `engines` are those of TensorRT's by the version that they are of."""

    executor: Executor
    oracle: TorchExecutor
    scratch: Path
    graph_cache: Path
    engines: dict[str, dict[str, Pulled]] = field(default_factory=dict)
    counter: Iterator[int] = field(default_factory=itertools.count)

    @property
    def needs_engines(self) -> bool:
        return isinstance(self.executor, TensorRTExecutor)

    def variant(self, changed: Changed, of: Version) -> tuple[Executor, TorchExecutor]:
        """The executor with the weights of this checkpoint, and torch's."""
        oracle = self.oracle.variant(changed)
        if self.needs_engines:
            graphs = oracle.graphs
            names = [name for name in self.engines[""] if component_of(name) in changed]
            self.engines[of.digest] = self._made(graphs, names, of.digest)
        return self.executor.variant(changed, of=of), oracle

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:
        if self.needs_engines:
            graphs = NetGraphs.of(load(), PRECISION_OF[self.executor.dtype])
            self.engines[version.digest] = self._made(graphs, graphs.names, version.digest)
        return self.executor.load_net(version, load)

    def _made(self, graphs: Any, names: Any, of: str) -> dict[str, Pulled]:
        return make_engines(graphs, names, self.scratch / str(next(self.counter)), self.graph_cache, of=of)


def open_executor(
    name: str,
    folder: Path,
    scratch: Path,
    graph_cache: Path,
    *,
    family: Family = "sd1",
    precision: Precision = "fp32",
    denoiser: str = "unet.every",
) -> Opened:
    """Over a folder in the diffusers layout. `scratch` is for engines, exported graphs are kept in `graph_cache`.

    TensorRT gets the engine of one `denoiser`, by default the one that takes all that rows may carry.
    """
    oracle = TorchExecutor.load(folder, FAMILIES[family], "cpu", precision)
    if name == "torch":
        return Opened(TorchExecutor.load(folder, FAMILIES[family], "cpu", precision), oracle, scratch, graph_cache)
    if name == "onnxruntime":
        executor = OnnxRuntimeExecutor.load(folder, FAMILIES[family], graph_cache, "cpu", precision)
        return Opened(executor, oracle, scratch, graph_cache)
    weights = TorchExecutor.load(folder, FAMILIES[family], "cpu", precision)
    graphs = weights.graphs
    names = (*graphs.texts, "kv_projection", denoiser, "vae_decoder", "vae_encoder")
    engines = {"": make_engines(graphs, names, scratch / "base", graph_cache, of="sha256:base")}
    cpu = torch.device("cpu")
    lent = lambda: Stepping(Buffers(cpu), Graphs(StrictCapture()))  # noqa: E731
    runtime = EngineRuntime.on(FakeTensorRT(), cpu, lent)  # type: ignore[arg-type]
    on_engines = TensorRTExecutor(
        weights,
        Engines(graphs, engines[""], runtime),
        {"executor": "tensorrt"},
        lambda version: engines.get(version.digest, {}),
    )
    return Opened(on_engines, oracle, scratch, graph_cache, engines)
