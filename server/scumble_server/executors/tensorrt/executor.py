"""The TensorRT executor, for both flavours: runs a base's engines.

A `TorchExecutor` keeps the weights in host memory for what reads them (DoRA, digests); engines have their own copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from scumble.errors import Refused, Unavailable
from scumble_build.engines.api import Flavour, load
from scumble_build.engines.builder import current_sm
from scumble_build.engines.key import Machine
from scumble_build.engines.store import Pulled
from scumble_build.export.plan import component_of
from scumble_build.graphs.families import Family
from scumble_registry import Registry, Version
from scumble_server.config import ServerConfig
from scumble_server.executors.device import Stepping, faults
from scumble_server.executors.exported import ExportedExecutor
from scumble_server.executors.graph_net import GraphNets
from scumble_server.executors.protocol import Changed, NetModel, Nets
from scumble_server.executors.tensorrt.engines import EngineRuntime, Engines, NetEngines
from scumble_server.executors.tensorrt.fitting import pull_base, pull_fitting
from scumble_server.executors.torch.executor import TorchExecutor
from scumble_server.executors.torch.net import torch_nets
from scumble_server.executors.torch.vae import TorchVae

log = logging.getLogger(__name__)

PullEngines: TypeAlias = Callable[[Version], Mapping[str, Pulled]]
"""Returns a version's engines that fit this machine, by graph."""


class TensorRTExecutor(ExportedExecutor):
    """Owns the engines of one set of weights."""

    copies = 1

    def __init__(
        self,
        weights: TorchExecutor,
        engines: Engines,
        receipt: Mapping[str, str],
        pull: PullEngines = lambda _version: {},
    ) -> None:
        """Load the engines that every request runs, so that corrupt ones show now; others when `prepare` asks for them.

        `receipt` names TensorRT and the
        engines; `pull` finds the engines of a request's ControlNet or checkpoint.
        """
        self._engines, self._receipt, self._pull = engines, dict(receipt), pull
        super().__init__(weights, engines)
        self.max_rows = min(weights.max_rows, engines.most("rows") or weights.max_rows)
        self.most_pages = engines.most("resident"), engines.most("resident_rest")
        self.limits = engines.denoiser_limits

    @classmethod
    def load(
        cls, registry: Registry, version: Version, folder: Path, family: Family, flavour: Flavour, config: ServerConfig
    ) -> TensorRTExecutor:
        """Load a base's engines. Raises Unavailable without a GPU or TensorRT, NotFound without engines that fit, and
        as loading them does.
        """
        trt, sm = load(flavour), current_sm()
        if config.device != "cuda" or sm is None:
            raise Unavailable("TensorRT needs a CUDA device: serve with --device cuda on a machine with an NVIDIA GPU")
        machine = Machine(flavour, trt.__version__, sm)
        pulled = pull_base(registry, version, machine, config)
        weights = TorchExecutor.load(folder, family, "cpu", config.precision, config.max_rows)
        device = torch.device("cuda")
        engines = Engines(
            weights.graphs,
            pulled,
            EngineRuntime.on(trt, device, lambda: Stepping.on(device, graphs=config.cuda_graphs)),
        )
        receipt = {
            "executor": flavour.value,
            flavour.value: trt.__version__,
            "device": torch.cuda.get_device_name(device),
            **_digests(pulled),
        }
        pull = partial(pull_fitting, registry, machine=machine, precision=config.precision)
        return cls(weights, engines, receipt, pull)

    @property
    def device(self) -> str:
        return str(self._engines.runtime.device)

    def variant(self, changed: Changed, configs: Path | None = None, of: Version | None = None) -> TensorRTExecutor:
        """Make an executor with the checkpoint's own engines for the components that it changes, and the base's for
        others.

        Raises Refused if one is missing, and for merged LoRAs (`of` None), which have no engines.
        """
        if of is None:
            raise Refused(
                "this request's LoRAs exceed the largest rank or are not low-rank, so they are "
                "merged into weights, which engines do not support; serve with --executor torch"
            )
        own = self._pull(of)
        candidates = {
            name: own.get(name) if component_of(name) in changed else engine
            for name, engine in self._engines.pulled.items()
        }
        pulled = {name: engine for name, engine in candidates.items() if engine is not None}
        if len(pulled) < len(candidates):
            missing = ", ".join(sorted(candidates.keys() - pulled.keys()))
            raise Refused(
                f"{of.ref} changes weights and has no engine of {missing} that fits; run `scumble build engine "
                f"--base {of.ref}`, or serve with --executor torch",
                ref=of.ref,
            )
        weights = self._weights.variant(changed, configs)
        engines = Engines(weights.graphs, pulled, self._engines.runtime, self._engines)
        return TensorRTExecutor(weights, engines, self._receipt | _digests(pulled), self._pull)

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:
        """Load a ControlNet: its engines, or torch on the same device if none fit."""
        pulled = self._pull(version)
        step = pulled.get("controlnet")
        names = ["controlnet", "controlnet_kv", "controlnet_hint"]
        if step is not None and any(port.name == "added" for port in step.manifest.inputs):
            names.append("controlnet_condition")
        if all(name in pulled for name in names):
            return GraphNets(NetEngines({name: pulled[name] for name in names}, self._engines.runtime))
        log.warning(
            "%s runs in torch, because it has no engines that fit: run `scumble build engine --base BASE "
            "--controlnet %s`",
            version.ref,
            version.ref,
        )
        with faults(f"the weights of {version.ref}"):
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            return torch_nets(load(), like, self._engines.runtime.steppings["denoise"])

    def load_vae(self, folder: Path) -> TorchVae:
        """Load a VAE in torch, on the same device."""
        vae = self._weights.load_vae(folder)
        vae.move(self._engines.runtime.device)
        return vae

    def describe(self) -> dict[str, str]:
        return {**self._weights.describe(), **self._receipt}


def _digests(pulled: Mapping[str, Pulled]) -> dict[str, str]:
    """Return the engines' digests, for the receipt."""
    return {f"engine {name}": engine.stored.digest for name, engine in pulled.items()}
