"""The ONNX Runtime executor: a base's exported graphs on a CPU, or on CUDA if that provider is installed.

Sessions get torch's weights as initializers. Graphs come from a cache on disk (`GraphCache`). Those that every request
runs are exported when the executor is made, the denoiser's other graphs (`export.denoiser`) when `prepare` first needs
them, so that no step waits for an export. ControlNets have sessions of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scumble_build.export.cached import GraphCache
from scumble_build.export.control import NetGraphs
from scumble_build.export.manifest import Precision
from scumble_build.export.plan import BaseGraphs
from scumble_build.graphs.families import Family
from scumble_build.graphs.models import load_autoencoder
from scumble_registry import Version
from scumble_server.executors.exported import ExportedExecutor
from scumble_server.executors.graph_net import GraphNets
from scumble_server.executors.graph_vae import graph_vae
from scumble_server.executors.onnxruntime.sessions import OrtSessions, check_available, device_type, version
from scumble_server.executors.protocol import Changed, NetModel
from scumble_server.executors.torch.executor import PRECISION_OF, TorchExecutor
from scumble_server.executors.torch.vae import TorchVae


class OnnxRuntimeExecutor(ExportedExecutor):
    """Owns ONNX Runtime's sessions over the weights of one `TorchExecutor`."""

    copies = 2
    """ONNX Runtime holds a second copy of the weights, packed for its kernels."""

    def __init__(
        self, weights: TorchExecutor, cache: GraphCache, parent: OrtSessions[BaseGraphs] | None = None
    ) -> None:
        """Export the graphs that every request runs, unless `cache` has them.

        Components that share all their tensors with `parent` run in its sessions.
        """
        self._cache = cache
        self._own = OrtSessions(weights.graphs, cache, device_type(weights.device), parent)
        super().__init__(weights, self._own)

    @classmethod
    def load(
        cls,
        folder: Path,
        family: Family,
        cache: Path,
        device: str = "cpu",
        precision: Precision = "fp32",
        max_rows: int = 32,
    ) -> OnnxRuntimeExecutor:
        """Load a base from a folder in the diffusers layout; exported graphs are cached in `cache`.

        Raises Unavailable, naming what is missing, if ONNX Runtime is not installed or cannot run this configuration.
        """
        check_available(device, precision)
        return cls(TorchExecutor.load(folder, family, device, precision, max_rows), GraphCache(cache))

    def variant(
        self,
        changed: Changed,
        configs: Path | None = None,
        of: Version | None = None,  # noqa: ARG002 - TensorRT chooses engines by it
    ) -> OnnxRuntimeExecutor:
        return OnnxRuntimeExecutor(self._weights.variant(changed, configs), self._cache, self._own)

    @property
    def device(self) -> str:
        return self._weights.device

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> GraphNets:  # noqa: ARG002 - as in `variant`
        graphs = NetGraphs.of(load().to(self._weights.device), PRECISION_OF[self.dtype])
        sessions = OrtSessions(graphs, self._cache, device_type(self.device))
        for name in graphs.names:
            sessions[name]  # export now, so that no step waits for it
        return GraphNets(sessions)

    def load_vae(self, folder: Path) -> TorchVae:
        vae = load_autoencoder(folder, self.dtype).to(self._weights.device).eval()
        sessions = OrtSessions(self._weights.graphs.with_vae(vae), self._cache, device_type(self.device))
        return graph_vae(sessions, self.device)

    def describe(self) -> dict[str, str]:
        return {**self._weights.describe(), "executor": "onnxruntime", "onnxruntime": version()}
