"""Exported graphs in ONNX Runtime, with torch's weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from scumble.errors import Unavailable
from scumble_build.export.cached import GraphCache
from scumble_build.export.graph import DTYPES, Graph
from scumble_server.executors.cuda import alone, settle
from scumble_server.executors.limits import GraphLimits

try:
    import onnxruntime as ort
except ModuleNotFoundError:
    ort = None

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ExportedGraphs(Protocol):
    """The graphs of a base (`export.plan.BaseGraphs`) or of a ControlNet (`export.control.NetGraphs`)."""

    def graph(self, name: str) -> Graph: ...
    def graph_state(self, name: str) -> Mapping[str, Tensor]: ...
    def config(self, name: str) -> Mapping[str, Any]: ...


def check_available(device: str, precision: str) -> None:
    """Check that ONNX Runtime can run on this device in this precision. Raises Unavailable, naming what is missing."""
    if ort is None:
        raise Unavailable(
            "the executor is onnxruntime, but ONNX Runtime is not installed; "
            "run pip install 'scumble[server]', or use --executor torch"
        )
    if precision == "bf16":
        raise Unavailable("ONNX Runtime has few bfloat16 operators; use --precision fp32 or fp16, or --executor torch")
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise Unavailable(
            f"the executor is onnxruntime on {device}, but this ONNX Runtime has no {provider} "
            f"(it has {', '.join(ort.get_available_providers())}); install onnxruntime-gpu, or use --device cpu"
        )


def version() -> str:
    return str(ort.__version__)


def device_type(device: str) -> str:
    """Return ONNX Runtime's name of a device: `cuda` for `cuda:0`."""
    return torch.device(device).type


GraphsT = TypeVar("GraphsT", bound=ExportedGraphs)


class _Session:
    """Implements `executors.sessions.Session`."""

    def __init__(self, graph: Graph, session: Any, weights: Mapping[str, Any], device: str) -> None:
        """Keep `weights` alive, because the session reads them in place."""
        self.graph, self._session, self._weights, self._device = graph, session, weights, device
        self.limits = GraphLimits(graph.name, ({},))

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the graph. Feeds are all inputs by name and are cast to the graph's dtypes; outputs are in its order."""
        binding = self._session.io_binding()
        bound = []  # keeps casts alive during the run
        for port in self.graph.inputs:
            tensor = feeds[port.name].to(self._device, DTYPES[port.dtype]).contiguous()
            bound.append(tensor)
            binding.bind_input(port.name, self._device, 0, np.dtype(port.dtype), tuple(tensor.shape), tensor.data_ptr())
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device)
        settle(self._device)  # ONNX Runtime has a stream of its own, which knows nothing of what torch wrote on ours
        self._session.run_with_iobinding(binding)  # waits until the outputs are there
        return [from_dlpack(value._get_c_value().to_dlpack()) for value in binding.get_outputs()]  # noqa: SLF001


class OrtSessions(Generic[GraphsT]):
    """The sessions of one set of weights, each opened on first use. Any thread may call it."""

    def __init__(
        self, graphs: GraphsT, cache: GraphCache, device: str, parent: OrtSessions[GraphsT] | None = None
    ) -> None:
        """Take graphs to open; components that share all their tensors with `parent` run in its sessions."""
        self.graphs, self._cache, self._device, self._parent = graphs, cache, device, parent
        self._opened: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> _Session:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._shared(name) or self._open(name)
            return self._opened[name]

    def close(self) -> None:
        """Do nothing: graphs are cached already, and nothing else is compiled."""

    def _shared(self, name: str) -> _Session | None:
        parent = self._parent
        if parent is None or not _same(self.graphs.graph_state(name), parent.graphs.graph_state(name)):
            return None
        return parent[name]

    def _open(self, name: str) -> _Session:
        graphs = self.graphs
        graph: Graph = graphs.graph(name)
        traced = self._cache.traced(lambda: graph, name, graph.precision, graphs.config(name))
        weights = {
            own: ort.OrtValue.ortvalue_from_numpy(graph.parameters[theirs].detach().cpu().contiguous().numpy())
            for own, theirs in traced.parameters.items()
        }
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Spinning threads would take cores from torch, which runs between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # sizes change from call to call
        options.log_severity_level = 3
        options.add_external_initializers(list(weights), list(weights.values()))
        content, providers = traced.model.SerializeToString(), [PROVIDERS[self._device]]
        with alone():
            session = ort.InferenceSession(content, options, providers=providers)
        return _Session(graph, session, weights, self._device)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(tensor.data_ptr() == b[name].data_ptr() for name, tensor in a.items())
