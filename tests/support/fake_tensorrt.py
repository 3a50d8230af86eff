"""TensorRT's Python API over ONNX Runtime, for machines without a GPU: what is given by address is read there, what is
computed is written there. A plan is the path of a graph and the shapes of its profiles.

It is stricter than TensorRT, which computes something wrong or fails much later: nothing of a context may be set while
a thread captures, a context that was captured takes no other shape, two captures never overlap, and the default stream
is refused, where `streams` says that there are others. `StrictCapture` is the capture that goes with it.

Only what an executor calls is here; what builds engines is tried with the real thing.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from scumble_build.engines.profiles import Profile
from scumble_build.export.manifest import GraphManifest

NAMES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}


_capturing: set[int] = set()
"""Threads that capture."""


class Misused(AssertionError):
    """TensorRT or CUDA would not have taken this."""


class StrictCapture:
    """Captures as CUDA does: the addresses and shapes of then are what a replay runs on."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if _capturing:
            raise Misused("two captures overlap")
        _capturing.add(threading.get_ident())
        try:
            result = work()
        finally:
            _capturing.discard(threading.get_ident())
        self.captures += 1

        def replay() -> Any:
            work()
            return result

        return replay


def _not_captured(what: str) -> None:
    if threading.get_ident() in _capturing:
        raise Misused(f"{what} while this thread captures")


@dataclass(frozen=True)
class Named:
    name: str


def make_plan(onnx: Path, manifest: GraphManifest, profiles: Sequence[Profile], plan: Path) -> None:
    shapes = [profile.shapes(manifest) for profile in profiles]
    plan.write_text(json.dumps({"onnx": str(onnx), "manifest": manifest.model_dump(mode="json"), "profiles": shapes}))


@dataclass
class FakeTensorRT:
    """Stands for the module. `fails` may raise, or return words for the log, before anything else is done."""

    __version__: str = "1.7.1"
    validity: str = "VALID"
    fails: Callable[[str], str | None] = lambda _what: None
    contexts: list[FakeContext] = field(default_factory=list)
    capturable: bool = True
    streams: bool = False

    class ILogger:
        def __init__(self) -> None: ...

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = Named("USER_MANAGED")

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = Named("EAGER")

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, logger)

    def failed(self, what: str, logger: Any) -> bool:
        words = self.fails(what)
        if words is not None:
            logger.log(Named("ERROR"), words)
        return words is not None


@dataclass
class FakeRuntime:
    module: FakeTensorRT
    logger: Any

    def get_engine_validity(self, _plan: bytes) -> tuple[Named, int]:
        return Named(self.module.validity), 4

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        if self.module.failed("deserialize", self.logger):
            return None
        try:
            about = json.loads(plan)
        except ValueError:
            self.logger.log(Named("ERROR"), "Magic tag does not match")
            return None
        return FakeEngine(self.module, self.logger, about, GraphManifest.model_validate(about["manifest"]))


class FakeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return content.startswith(b"kernels")

    def serialize(self) -> bytes:
        return b"kernels"


class FakeConfig:
    def __init__(self) -> None:
        self.cache = FakeCache()
        self.dynamic_shapes_kernel_specialization_strategy = Named("LAZY")

    def create_runtime_cache(self) -> FakeCache:
        return self.cache

    def set_runtime_cache(self, _cache: FakeCache) -> bool:
        return True

    def set_execution_context_allocation_strategy(self, strategy: Named) -> None:
        assert strategy.name == "USER_MANAGED"


@dataclass
class FakeEngine:
    module: FakeTensorRT
    logger: Any
    about: dict[str, Any]
    manifest: GraphManifest

    @property
    def ports(self) -> list[Any]:
        return [*self.manifest.inputs, *self.manifest.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.about["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return str(self.ports[index].name)

    def get_tensor_dtype(self, name: str) -> Named:
        return Named(NAMES[next(port.dtype for port in self.ports if port.name == name)])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.about["profiles"][profile][name]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, how: Any) -> FakeContext | None:
        _not_captured("a context is made")
        if isinstance(how, FakeConfig):
            assert how.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        if self.module.failed("context", self.logger):
            return None
        context = FakeContext(self)
        self.module.contexts.append(context)
        return context


@dataclass
class FakeContext:
    engine: FakeEngine
    profile: int = -1
    runs: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: tuple[int, int] = (0, 0)
    captured_with: dict[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        self.session = onnxruntime.InferenceSession(self.engine.about["onnx"], providers=["CPUExecutionProvider"])

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        _not_captured("a profile is set")
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        _not_captured("a shape is set")
        if self.captured_with is not None and self.captured_with[name] != shape:
            raise Misused("a context that was captured takes another shape")
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            dim: size
            for port in self.engine.manifest.inputs
            for dim, size in zip(port.dims, self.shapes[port.name], strict=True)
        }
        for pixel, axis in self.engine.manifest.axes.items():  # of a VAE: what it makes of latents, or reads
            latent = pixel.removeprefix("pixel_")
            if pixel in sizes:
                sizes.setdefault(latent, sizes[pixel] // axis.multiple)
            elif latent in sizes:
                sizes[pixel] = sizes[latent] * axis.multiple
        for level, axis in self.engine.manifest.axes.items():
            if axis.of in sizes:
                sizes.setdefault(level, -(-sizes[axis.of] // 2**axis.halvings))
        port = next(port for port in self.engine.ports if port.name == name)
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in port.dims)

    def set_device_memory(self, address: int, size: int) -> None:
        _not_captured("scratch memory is set")
        self.scratch = address, size

    def update_device_memory_size_for_shapes(self) -> int:
        return 100 + 10 * sum(map(prod, self.shapes.values()))

    def is_stream_capturable(self, _stream: int) -> bool:
        return self.engine.module.capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        _not_captured("an address is set")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if stream == 0 and self.engine.module.streams:
            raise Misused("a run on the default stream, which ends captures")
        if threading.get_ident() in _capturing:
            self.captured_with = dict(self.shapes)
        if self.engine.module.failed("run", self.engine.logger):
            return False
        assert self.scratch[1] >= self.update_device_memory_size_for_shapes()
        self.runs += 1
        feeds = {port.name: self._at(port) for port in self.engine.manifest.inputs}
        for port, found in zip(self.engine.manifest.outputs, self.session.run(None, feeds), strict=True):
            self._at(port)[...] = found
        return True

    def _at(self, port: Any) -> np.ndarray:
        """The memory at a tensor's address."""
        shape, dtype = self.get_tensor_shape(port.name), np.dtype(port.dtype)
        assert self.addresses[port.name] % 256 == 0
        memory = (ctypes.c_char * (prod(shape) * dtype.itemsize)).from_address(self.addresses[port.name])
        return np.frombuffer(memory, dtype).reshape(shape)
