"""The TensorRT executor, for both flavours: a base's engines over the feeds that every exported graph takes.

Weights stay in host memory as `TorchExecutor` loaded them, for what reads them (DoRA, digests); engines hold their own.
Each thread that calls has buffers and graphs of its own: texts and pictures are encoded by one, rows denoised by
another, latents decoded by a third.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from scumble.errors import NotFound, Refused, Unavailable
from scumble_build.engines import store
from scumble_build.engines.api import Flavour, TensorRT, load
from scumble_build.engines.builder import current_sm
from scumble_build.engines.key import Machine
from scumble_build.engines.store import Pulled
from scumble_build.export.cached import GraphCache
from scumble_build.export.denoiser import GRAPHS
from scumble_build.export.manifest import GraphManifest, Precision
from scumble_build.export.plan import BaseGraphs, component_of
from scumble_build.export.provenance import code_digest
from scumble_build.graphs.families import Family
from scumble_registry import Registry, Version
from scumble_server.config import ServerConfig
from scumble_server.executors.device import Stepping, faults
from scumble_server.executors.graph_net import GraphNets
from scumble_server.executors.limits import GraphLimits
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.protocol import Changed, NetModel, Nets
from scumble_server.executors.tensorrt.engine import RunningEngine
from scumble_server.executors.torch.executor import TorchExecutor
from scumble_server.executors.torch.net import torch_nets
from scumble_server.executors.torch.vae import TorchVae

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Session:
    graph: GraphManifest
    engine: RunningEngine

    @property
    def limits(self) -> GraphLimits:
        return self.engine.of_axes

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """More rows than the engine takes are run in parts. Results are the caller's own: the engine's stay only until
        its thread's next run.
        """
        ports = {port.name: port.dims for port in self.graph.inputs}
        of_rows = [name for name, dims in ports.items() if dims[0] == "rows"]
        rows = len(feeds[of_rows[0]])
        most = max(limits.most[of_rows[0]][0] for limits in self.engine.limits)
        if any(port.dims[0] != "rows" for port in self.graph.outputs):
            most = rows  # they become one, as a union net's pictures do
        parts = []
        for start in range(0, rows, most):
            part = {name: feeds[name][start : start + most] if name in of_rows else feeds[name] for name in ports}
            parts.append([output.clone() for output in self.engine.run(part).values()])
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What engines run with on one device: each thread that calls has buffers and graphs of its own."""

    trt: TensorRT
    device: torch.device
    steppings: Mapping[str, Stepping]

    @classmethod
    def on(cls, trt: TensorRT, device: torch.device, make: Callable[[], Stepping]) -> Runtime:
        return cls(trt, device, {name: make() for name in ("condition", "denoise", "decode")})

    def load(self, pulled: Pulled) -> _Session:
        """Raises as `RunningEngine` does."""
        stepping = self.steppings[_caller(pulled.manifest.graph)]
        return _Session(pulled.manifest, RunningEngine(self.trt, pulled, stepping, self.device))


class Engines:
    """The engines of one set of a base's weights, each loaded when it is first asked for. Any thread may ask."""

    def __init__(
        self, graphs: BaseGraphs, pulled: Mapping[str, Pulled], runtime: Runtime, parent: Engines | None = None
    ) -> None:
        """What is `parent`'s own runs there. Raises NotFound if a part has no engine."""
        self.graphs = graphs
        self.pulled = dict(pulled)
        self.runtime = runtime
        self._parent = parent
        self._loaded: dict[str, _Session] = {}
        self._lock = threading.Lock()
        missing = [
            name for name in (*graphs.texts, "kv_projection", "vae_decoder", "vae_encoder") if name not in pulled
        ]
        if not any(name.startswith("unet.") for name in pulled):
            missing.append("unet.small")
        if missing:
            raise NotFound(f"there is no engine of {', '.join(missing)}; run `scumble build engine`", graphs=missing)

    def __getitem__(self, name: str) -> _Session:
        """Of a denoiser's graph that has no engine, the next larger one's, which takes all that it takes.

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
        larger = [f"{kind}.{each}" for each in order[order.index(which) :]] if which in order else []
        found = next((each for each in larger if each in self.pulled), None)
        if found is None:
            raise Refused(
                f"what this request carries needs the graph {name}, and this base has no engine of it; "
                f"run `scumble build engine --part {name}`, or serve with --executor torch",
                graph=name,
            )
        return found

    def most(self, port: str) -> int | None:
        """What every denoiser's engine that has this input takes of its first dim; None if none has it."""
        found = [self[name].engine.limits for name in self.pulled if name.startswith("unet.")]
        return min(
            (max(one.most[port][0] for one in limits) for limits in found if port in limits[0].most), default=None
        )

    def keep_runtime_caches(self) -> None:
        for session in self._loaded.values():
            session.engine.keep_runtime_cache()


def _caller(name: str) -> str:
    """The thread that runs a graph."""
    if name.startswith("unet.") or name == "controlnet":
        return "denoise"
    return "decode" if name == "vae_decoder" else "condition"


Find: TypeAlias = Callable[[Version], Mapping[str, Pulled]]


class TensorRTExecutor(OnnxRuntimeExecutor):
    """Feeds engines what ONNX Runtime would be fed."""

    copies = 1

    def __init__(
        self, weights: TorchExecutor, engines: Engines, about: Mapping[str, str], find: Find = lambda _version: {}
    ) -> None:
        """Loads every engine, so that a corrupt one is found now. `find` says which engines a version has that fit:
        those of ControlNets and checkpoints are asked for when they are.
        """
        self._engines, self._about, self._find = engines, dict(about), find
        self._place = engines.runtime.device
        super().__init__(weights, GraphCache(Path("unused")), sessions=engines)
        self.max_rows = min(weights.max_rows, engines.most("sample") or weights.max_rows)
        self.most_pages = engines.most("A"), engines.most("A_rest")
        self.limits = tuple(engines[name].limits for name in engines.pulled if name.startswith("unet."))

    @classmethod
    def load(  # type: ignore[override] # engines come from the registry, graphs from a cache
        cls, registry: Registry, version: Version, folder: Path, family: Family, flavour: Flavour, config: ServerConfig
    ) -> TensorRTExecutor:
        """Raises Unavailable without a GPU or TensorRT, NotFound without engines that fit, and as these do."""
        trt, sm = load(flavour), current_sm()
        if config.device != "cuda" or sm is None:
            raise Unavailable("TensorRT needs a CUDA device: serve with --device cuda on a machine that has one")
        machine = Machine(flavour, trt.__version__, sm)
        pulled = pull_fitting(registry, version, machine, config)
        weights = TorchExecutor.load(folder, family, "cpu", config.precision, config.max_rows)
        device = torch.device("cuda")
        engines = Engines(weights.graphs, pulled, Runtime.on(trt, device, lambda: Stepping.on(device)))
        about = {
            "executor": flavour.value,
            flavour.value: trt.__version__,
            "device": torch.cuda.get_device_name(device),
            **_digests(pulled),
        }
        find = partial(fitting, registry, machine=machine, precision=config.precision)
        return cls(weights, engines, about, find)

    @property
    def device(self) -> str:
        return str(self._place)

    def variant(self, changed: Changed, configs: Path | None = None, of: Version | None = None) -> TensorRTExecutor:
        """On engines of the checkpoint's own for every component that it changes, on the base's for the others.

        Raises Refused if one is missing, and for weights that are no version's: no engine holds them.
        """
        if of is None:
            raise Refused(
                "this request's LoRAs are too many for factors, or change what no factors say, and are merged into "
                "weights, which engines hold their own of; serve with --executor torch"
            )
        found = self._find(of)
        pulled = {
            name: found.get(name) if component_of(name) in changed else each
            for name, each in self._engines.pulled.items()
        }
        there = {name: each for name, each in pulled.items() if each is not None}
        if len(there) < len(pulled):
            missing = ", ".join(sorted(pulled.keys() - there.keys()))
            raise Refused(
                f"{of.ref} changes weights, and has no engine that fits of {missing}; run `scumble build engine "
                f"--base {of.ref}`, or serve with --executor torch",
                ref=of.ref,
            )
        weights = self._weights.variant(changed, configs)
        engines = Engines(weights.graphs, there, self._engines.runtime, self._engines)
        return TensorRTExecutor(weights, engines, self._about | _digests(there), self._find)

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:
        """On engines of its own, or in torch on the same device, if it has none that fit."""
        found = self._find(version)
        step = found.get("controlnet")
        names = ["controlnet", "controlnet_kv", "controlnet_hint"]
        if step is not None and any(port.name == "added" for port in step.manifest.inputs):
            names.append("controlnet_condition")
        if all(name in found for name in names):
            return GraphNets({name: self._engines.runtime.load(found[name]) for name in names})
        log.warning(
            "%s runs in torch beside the engines, for it has none that fit: run `scumble build engine --base BASE "
            "--controlnet %s`",
            version.ref,
            version.ref,
        )
        with faults(f"the weights of {version.ref}"):
            return torch_nets(load(), torch.empty(0, dtype=self.dtype, device=self._place))

    def load_vae(self, folder: Path) -> TorchVae:
        """In torch, beside the engines."""
        vae = self._weights.load_vae(folder)
        vae.move(self._place)
        return vae

    def describe(self) -> dict[str, str]:
        return {**self._weights.describe(), **self._about}


def _digests(pulled: Mapping[str, Pulled]) -> dict[str, str]:
    """For the receipt."""
    return {f"engine {name}": each.stored.digest for name, each in pulled.items()}


def fitting(registry: Registry, version: Version, machine: Machine, precision: Precision) -> dict[str, Pulled]:
    """By graph, what fits this machine and was made by this code; the log says what does not. Raises IntegrityError."""
    found: dict[str, Pulled] = {}
    for name, each in store.fitting(store.listed(registry, version), machine, version.digest, precision).items():
        pulled = store.pull(registry, each)
        try:
            store.check_current(pulled, code_digest())
        except Refused as error:
            log.warning("%s", error)
        else:
            found[name] = pulled
    return found


def pull_fitting(registry: Registry, version: Version, machine: Machine, config: ServerConfig) -> dict[str, Pulled]:
    """A base's; built now if there is none and the configuration says so. Raises NotFound, IntegrityError, and as a
    build does.
    """
    found = fitting(registry, version, machine, config.precision)
    if not found and config.build_engines:
        _build(version, machine, config)
        found = fitting(registry, version, machine, config.precision)
    if not found:
        raise NotFound(
            f"{version.ref} has no engine for {machine.flavour} {machine.version} on SM{machine.sm} in "
            f"{config.precision}; run `scumble build engine --base {version.ref} --flavour {machine.flavour} "
            f"--precision {config.precision}`"
        )
    return found


def _build(version: Version, machine: Machine, config: ServerConfig) -> None:
    from scumble_build.engines.command import build_into

    log.warning("%s has no engine that fits; building them now, which takes minutes to hours", version.ref)
    build_into(version.ref, config.home, machine.flavour, (machine.sm,), config.precision)
