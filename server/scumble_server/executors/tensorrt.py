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
from pathlib import Path

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
from scumble_build.export.manifest import GraphManifest
from scumble_build.export.plan import BaseGraphs
from scumble_build.export.provenance import code_digest
from scumble_build.families import Family
from scumble_registry import Registry, Version
from scumble_server.config import ServerConfig
from scumble_server.executors import Changed
from scumble_server.executors.device import Stepping
from scumble_server.executors.engine import RunningEngine
from scumble_server.executors.onnxruntime import OnnxRuntimeExecutor
from scumble_server.executors.torch import TorchExecutor
from scumble_server.executors.torch_vae import TorchVae

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Session:
    graph: GraphManifest
    engine: RunningEngine

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """More rows than the engine takes are run in parts. Results are the caller's own: the engine's stay only until
        its thread's next run.
        """
        ports = {port.name: port.dims for port in self.graph.inputs}
        of_rows = [name for name, dims in ports.items() if dims[0] == "rows"]
        rows = len(feeds[of_rows[0]])
        most = max(limits.most[of_rows[0]][0] for limits in self.engine.limits)
        parts = []
        for start in range(0, rows, most):
            part = {name: feeds[name][start : start + most] if name in of_rows else feeds[name] for name in ports}
            parts.append([output.clone() for output in self.engine.run(part).values()])
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


class Engines:
    """The engines of one base, each loaded when it is first asked for. Any thread may ask."""

    def __init__(
        self,
        graphs: BaseGraphs,
        pulled: Mapping[str, Pulled],
        trt: TensorRT,
        make: Callable[[], Stepping],
        device: torch.device,
    ) -> None:
        """`make` gives each calling thread's buffers and graphs. Raises NotFound if a part has no engine."""
        self.graphs = graphs
        self.pulled = dict(pulled)
        self._trt, self._device = trt, device
        self._steppings = {name: make() for name in ("condition", "denoise", "decode")}
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
        with self._lock:
            name = self._nearest(name)
            if name not in self._loaded:
                pulled = self.pulled[name]
                engine = RunningEngine(self._trt, pulled, self._steppings[_caller(name)], self._device)
                self._loaded[name] = _Session(pulled.manifest, engine)
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
    return "denoise" if name.startswith("unet.") else "decode" if name == "vae_decoder" else "condition"


class TensorRTExecutor(OnnxRuntimeExecutor):
    """Feeds engines what ONNX Runtime would be fed."""

    def __init__(
        self, weights: TorchExecutor, engines: Engines, device: torch.device, about: Mapping[str, str]
    ) -> None:
        """Loads every engine, so that a corrupt one is found now."""
        self._engines, self._place, self._about = engines, device, dict(about)
        super().__init__(weights, GraphCache(Path("unused")), sessions=engines)
        self.max_rows = min(weights.max_rows, engines.most("sample") or weights.max_rows)
        self.most_pages = engines.most("A"), engines.most("A_rest")

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
        engines = Engines(weights.graphs, pulled, trt, lambda: Stepping.on(device), device)
        about = {
            "executor": flavour.value,
            flavour.value: trt.__version__,
            "device": torch.cuda.get_device_name(device),
            **{f"engine {name}": each.stored.digest for name, each in pulled.items()},
        }
        return cls(weights, engines, device, about)

    @property
    def device(self) -> str:
        return str(self._place)

    def variant(self, changed: Changed, configs: Path | None = None) -> OnnxRuntimeExecutor:  # noqa: ARG002
        raise Refused(
            "this request needs other weights than the base's (a checkpoint, or LoRAs that are too many for factors), "
            "and engines hold theirs; serve with --executor torch"
        )

    def load_vae(self, folder: Path) -> TorchVae:
        """In torch, beside the engines."""
        vae = self._weights.load_vae(folder)
        vae.move(self._place)
        return vae

    def describe(self) -> dict[str, str]:
        return {**self._weights.describe(), **self._about}


def pull_fitting(registry: Registry, version: Version, machine: Machine, config: ServerConfig) -> dict[str, Pulled]:
    """By graph, what fits this machine and was made by this code; built now, if the configuration says so.

    Raises NotFound, naming what there is instead, IntegrityError, and as a build does.
    """
    for built in (False, True) if config.build_engines else (False,):
        if built:
            _build(version, machine, config)
        stored = store.listed(registry, version)
        found: dict[str, Pulled] = {}
        for name, each in store.fitting(stored, machine, version.digest, config.precision).items():
            pulled = store.pull(registry, each)
            try:
                store.check_current(pulled, code_digest())
            except Refused as error:
                log.warning("%s", error)
            else:
                found[name] = pulled
        if found:
            return found
    raise NotFound(
        f"{version.ref} has no engine for {machine.flavour} {machine.version} on SM{machine.sm} in {config.precision}; "
        f"run `scumble build engine --base {version.ref} --flavour {machine.flavour} --precision {config.precision}`"
    )


def _build(version: Version, machine: Machine, config: ServerConfig) -> None:
    from scumble_build.engines.command import build_into

    log.warning("%s has no engine that fits; building them now, which takes minutes to hours", version.ref)
    build_into(version.ref, config.home, machine.flavour, (machine.sm,), config.precision)
