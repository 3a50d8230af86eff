"""A base's or a ControlNet's engines as sessions, each with the buffers and graphs of the thread that calls it.

One thread encodes texts and pictures, one denoises rows, one decodes latents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble.errors import NotFound, Refused
from scumble_build.engines.api import TensorRT
from scumble_build.engines.store import Pulled
from scumble_build.export.denoiser import GRAPHS
from scumble_build.export.manifest import GraphManifest
from scumble_build.export.plan import BaseGraphs
from scumble_server.executors.device import Stepping
from scumble_server.executors.limits import GraphLimits
from scumble_server.executors.tensorrt.engine import RunningEngine


@dataclass(frozen=True, slots=True)
class EngineSession:
    """One engine, as an `executors.sessions.Session`."""

    graph: GraphManifest
    engine: RunningEngine

    @property
    def limits(self) -> GraphLimits:
        return self.engine.graph_limits

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the engine, in parts if there are more rows than it accepts.

        Results are copies, because the thread's next run overwrites the engine's outputs.
        """
        ports = {port.name: port.dims for port in self.graph.inputs}
        of_rows = [name for name, dims in ports.items() if dims[0] == "rows"]
        rows = len(feeds[of_rows[0]])
        most = max(limits.most[of_rows[0]][0] for limits in self.engine.limits)
        if any(port.dims[0] != "rows" for port in self.graph.outputs):
            most = rows  # rows are reduced to one, as a union net's pictures are
        if rows <= most:  # as they are: what was copied to the device for the last step is known by its tensor
            return [output.clone() for output in self.engine.run({name: feeds[name] for name in ports}).values()]
        parts = []
        for start in range(0, rows, most):
            part = {name: feeds[name][start : start + most] if name in of_rows else feeds[name] for name in ports}
            parts.append([output.clone() for output in self.engine.run(part).values()])
        return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


@dataclass(frozen=True, slots=True)
class EngineRuntime:
    """TensorRT on one device, and the buffers and graphs of each thread that runs engines."""

    trt: TensorRT
    device: torch.device
    steppings: Mapping[str, Stepping]

    @classmethod
    def on(cls, trt: TensorRT, device: torch.device, make: Callable[[], Stepping]) -> EngineRuntime:
        return cls(trt, device, {name: make() for name in ("condition", "denoise", "decode")})

    def load(self, pulled: Pulled) -> EngineSession:
        """Load an engine. Raises as `RunningEngine` does."""
        stepping = self.steppings[_caller(pulled.manifest.graph)]
        return EngineSession(pulled.manifest, RunningEngine(self.trt, pulled, stepping, self.device))


def _limits(pulled: Pulled) -> GraphLimits:
    ranges = [
        {axis: range(least, most + 1) for axis, (least, _, most) in profile.items()}
        for profile in pulled.stored.key.profiles
    ]
    return GraphLimits(pulled.manifest.graph, tuple(ranges))


def _caller(graph: str) -> str:
    """Return the thread that runs a graph."""
    if graph.startswith("unet.") or graph == "controlnet":
        return "denoise"
    return "decode" if graph == "vae_decoder" else "condition"


class NetEngines:
    """The engines of one ControlNet, loaded at once. Any thread may call it."""

    def __init__(self, pulled: Mapping[str, Pulled], runtime: EngineRuntime) -> None:
        """Load all engines. Raises as `RunningEngine` does."""
        self._sessions = {name: runtime.load(engine) for name, engine in pulled.items()}

    def __getitem__(self, name: str) -> EngineSession:
        return self._sessions[name]

    def close(self) -> None:
        for session in self._sessions.values():
            session.engine.close()


class Engines:
    """The engines of one set of a base's weights, each loaded on first use. Any thread may call it."""

    def __init__(
        self, graphs: BaseGraphs, pulled: Mapping[str, Pulled], runtime: EngineRuntime, parent: Engines | None = None
    ) -> None:
        """Take engines, those that `parent` has too from there. Raises NotFound if a part has no engine."""
        self.graphs = graphs
        self.pulled = dict(pulled)
        self.runtime = runtime
        self._parent = parent
        self._loaded: dict[str, EngineSession] = {}
        self._lock = threading.Lock()
        missing = [
            name for name in (*graphs.texts, "kv_projection", "vae_decoder", "vae_encoder") if name not in pulled
        ]
        if not any(name.startswith("unet.") for name in pulled):
            missing.append("unet.small")
        if missing:
            raise NotFound(f"there is no engine of {', '.join(missing)}; run `scumble build engine`", graphs=missing)

    def __getitem__(self, name: str) -> EngineSession:
        """Return a graph's engine; for a denoiser's graph without one, that of the next larger graph, which has all its
        inputs.

        Raises Refused if there is none, and as `RunningEngine` does.
        """
        name = self._nearest(name)
        if self._parent is not None and self._parent.pulled.get(name) is self.pulled[name]:
            return self._parent[name]
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self.runtime.load(self.pulled[name])
            return self._loaded[name]

    def _nearest(self, name: str) -> str:
        if name in self.pulled:
            return name
        kind, _, which = name.partition(".")
        order = list(GRAPHS)
        larger = [f"{kind}.{graph}" for graph in order[order.index(which) :]] if which in order else []
        nearest = next((graph for graph in larger if graph in self.pulled), None)
        if nearest is None:
            raise Refused(
                f"this request's adapters need the graph {name}, and this base has no engine of it; "
                f"run `scumble build engine --part {name}`, or serve with --executor torch",
                graph=name,
            )
        return nearest

    @property
    def denoiser_limits(self) -> tuple[GraphLimits, ...]:
        """The sizes of the denoiser's engines, as they were built. None of them is loaded for it."""
        return tuple(_limits(engine) for name, engine in self.pulled.items() if name.startswith("unet."))

    def most(self, axis: str) -> int | None:
        """Return the largest size of an axis that all the denoiser's engines accept; None if none has the axis."""
        sizes = [limits.most(axis) for limits in self.denoiser_limits]
        return min((size for size in sizes if size is not None), default=None)

    def close(self) -> None:
        """Close its own engines, not `parent`'s."""
        with self._lock:
            for session in self._loaded.values():
                session.engine.close()
