"""Chooses the executor that the configuration names, or torch if TensorRT's engines cannot be loaded."""

from __future__ import annotations

import logging
from pathlib import Path

from scumble.errors import IntegrityError, NotFound, Refused, Unavailable
from scumble_build.engines.api import Flavour
from scumble_build.graphs.families import Family
from scumble_build.graphs.loading import loading
from scumble_registry import Registry, Version
from scumble_server.config import ServerConfig
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.protocol import Executor
from scumble_server.executors.tensorrt.executor import TensorRTExecutor
from scumble_server.executors.tensorrt.fitting import engine_bytes
from scumble_server.executors.torch.executor import TorchExecutor, weights_bytes

log = logging.getLogger(__name__)


def load_executor(registry: Registry, version: Version, family: Family, config: ServerConfig) -> Executor:
    """Load the executor of one base. Raises Refused for one that is not whole, Unavailable, naming what is missing.

    If the configuration names TensorRT and no engine can be loaded, torch serves the base and a warning has the reason.
    """
    with loading(version.ref, version.digest):
        return _load(registry, version, family, config)


def _load(registry: Registry, version: Version, family: Family, config: ServerConfig) -> Executor:
    if config.compile_steps and config.executor == "onnxruntime":
        log.warning("--compile is for torch alone; onnxruntime serves %s as it is", version.ref)
    folder = registry.materialise(version)
    if config.executor == "onnxruntime":
        cache = config.home / "cache" / "onnx"
        return OnnxRuntimeExecutor.load(folder, family, cache, config.device, config.precision, config.max_rows)
    if config.executor != "torch":
        try:
            return TensorRTExecutor.load(registry, version, folder, family, Flavour(config.executor), config)
        except (IntegrityError, NotFound, Refused, Unavailable) as error:
            log.warning("%s is served by torch, not by %s: %s", version.ref, config.executor, error)
    return TorchExecutor.load(
        folder,
        family,
        config.device,
        config.precision,
        config.max_rows,
        graphs=config.cuda_graphs,
        compiles=config.compile_steps,
        fused_lora=config.fused_lora,
    )


def executor_bytes(registry: Registry, version: Version, folder: Path, family: Family, config: ServerConfig) -> int:
    """Return how many bytes the weights of a base's executor take in device memory: its engines' all, once loaded."""
    if config.executor in tuple(Flavour) and (engines := engine_bytes(registry, version, config)):
        return engines
    copies = OnnxRuntimeExecutor.copies if config.executor == "onnxruntime" else TorchExecutor.copies
    return copies * weights_bytes(folder, family, config.precision)
