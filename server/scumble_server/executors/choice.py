"""Which executor a server's configuration asks for."""

from __future__ import annotations

from pathlib import Path

from scumble_build.families import Family
from scumble_server.config import ServerConfig
from scumble_server.executors import Executor
from scumble_server.executors.onnxruntime import OnnxRuntimeExecutor
from scumble_server.executors.torch import TorchExecutor, weights_bytes


def load_executor(folder: Path, family: Family, config: ServerConfig) -> Executor:
    """A base's, from its folder in the diffusers layout. Raises Unavailable, saying what is missing."""
    if config.executor == "onnxruntime":
        cache = config.home / "cache" / "onnx"
        return OnnxRuntimeExecutor.load(folder, family, cache, config.device, config.precision, config.max_rows)
    return TorchExecutor.load(folder, family, config.device, config.precision, config.max_rows)


def executor_bytes(folder: Path, family: Family, config: ServerConfig) -> int:
    """What its weights take once it is loaded. ONNX Runtime keeps them a second time, packed for its kernels."""
    copies = 2 if config.executor == "onnxruntime" else 1
    return copies * weights_bytes(folder, family, config.precision)
