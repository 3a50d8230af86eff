"""Types for the two TensorRTs: the part of their Python modules that is used here.

`tensorrt` (TensorRT: data centre and workstation, tuned on the GPU that it builds for) and `tensorrt_rtx` (TensorRT for
RTX: builds for a named compute capability without a GPU, finishes kernels on first use) have almost the same API.
Neither wheel has types, and neither needs to be installed to type-check this code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib import import_module
from typing import Any, Protocol, cast

from scumble.errors import Unavailable

Dims = tuple[int, ...]


class Flavour(StrEnum):
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"

    @property
    def is_rtx(self) -> bool:
        return self is Flavour.TENSORRT_RTX

    @property
    def install(self) -> str:
        """How to install it."""
        if self.is_rtx:
            return "pip install tensorrt-rtx-cu13"
        return "pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com, or run in NVIDIA's container"


class Named(Protocol):
    """A member of one of TensorRT's enumerations."""

    @property
    def name(self) -> str: ...


class NetworkTensor(Protocol):
    name: str

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Named: ...


class Network(Protocol):
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def get_input(self, index: int) -> NetworkTensor: ...
    def get_output(self, index: int) -> NetworkTensor: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node(self) -> int: ...
    def node_name(self) -> str: ...


class Parser(Protocol):
    @property
    def num_errors(self) -> int: ...
    def get_error(self, index: int) -> ParserError: ...
    def parse_from_file(self, path: str) -> bool: ...


class OptimizationProfile(Protocol):
    def set_shape(self, name: str, smallest: Dims, typical: Dims, largest: Dims) -> None: ...


class TimingCache(Protocol):
    def serialize(self) -> bytes: ...


class BuilderConfig(Protocol):
    progress_monitor: Any
    builder_optimization_level: int
    num_compute_capabilities: int

    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def set_compute_capability(self, capability: Any, index: int) -> bool: ...
    def set_memory_pool_limit(self, pool: Any, limit: int) -> None: ...
    def set_flag(self, flag: Any) -> None: ...
    def create_timing_cache(self, content: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> Any:
        """Build a plan: a buffer for memoryview, or None on failure."""


class RuntimeCache(Protocol):
    """TensorRT for RTX only: kernels that were compiled for this GPU."""

    def serialize(self) -> bytes: ...
    def deserialize(self, content: bytes) -> bool: ...


class RuntimeConfig(Protocol):
    """TensorRT for RTX only."""

    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: RuntimeCache) -> bool: ...
    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...

    dynamic_shapes_kernel_specialization_strategy: Any


class ExecutionContext(Protocol):
    def set_optimization_profile_async(self, index: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Dims) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def set_device_memory(self, address: int, size: int) -> None: ...
    def execute_async_v3(self, stream: int) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def is_stream_capturable(self, stream: int) -> bool:
        """TensorRT for RTX only."""


class Engine(Protocol):
    @property
    def num_io_tensors(self) -> int: ...
    @property
    def num_optimization_profiles(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_dtype(self, name: str) -> Named: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_tensor_profile_shape(self, name: str, profile: int) -> Sequence[Sequence[int]]: ...
    def create_execution_context(self, how: Any) -> ExecutionContext | None: ...
    def create_runtime_config(self) -> RuntimeConfig: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, plan: bytes | memoryview) -> Engine | None: ...
    def get_engine_validity(self, plan: bytes | memoryview) -> tuple[Named, int]:
        """Check from a plan's header whether it runs on this machine (TensorRT for RTX only)."""


class TensorRT(Protocol):
    """The module."""

    __version__: str

    # Enumerations and base classes, untyped.
    ILogger: Any
    IProgressMonitor: Any
    NetworkDefinitionCreationFlag: Any
    BuilderFlag: Any
    ComputeCapability: Any
    DynamicShapesKernelSpecializationStrategy: Any
    MemoryPoolType: Any
    ExecutionContextAllocationStrategy: Any

    @property
    def Builder(self) -> Callable[[Any], Builder]: ...  # noqa: N802 - theirs
    @property
    def OnnxParser(self) -> Callable[[Network, Any], Parser]: ...  # noqa: N802
    @property
    def Runtime(self) -> Callable[[Any], Runtime]: ...  # noqa: N802


def load(flavour: Flavour) -> TensorRT:
    """Import the module of this flavour. Raises Unavailable if it is not installed, with the command
    that installs it.
    """
    try:
        return cast(TensorRT, import_module(flavour.value))
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"{flavour} is not installed here ({error}); {flavour.install}", flavour=flavour.value
        ) from error
