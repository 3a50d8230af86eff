"""One TensorRT engine: tensors by name in and out, in fixed buffers, with CUDA graphs captured once.

Works for both flavours. Scratch memory and the buffers of inputs and outputs belong to the `Stepping` that all engines
of one thread share, because that thread runs them in turn.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scumble.errors import IntegrityError, OutOfMemory, Refused, ScumbleError, Unavailable
from scumble.files import write_whole
from scumble_build.engines.api import Dims, Engine, ExecutionContext, RuntimeCache, TensorRT
from scumble_build.engines.builder import DTYPES
from scumble_build.engines.progress import BuildLog, logger
from scumble_build.engines.store import Pulled
from scumble_build.export.manifest import GraphManifest
from scumble_server.executors.cuda import alone, give_back_memory, stream_handle
from scumble_server.executors.device import Stepping, faults
from scumble_server.executors.limits import GraphLimits

log = logging.getLogger(__name__)

TORCH: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}


@dataclass(frozen=True, slots=True)
class ShapeLimits:
    """The least and the largest shape of each input in one profile."""

    least: Mapping[str, Dims]
    most: Mapping[str, Dims]

    def hold(self, shapes: Mapping[str, Dims]) -> bool:
        return not self.outside(shapes)

    def outside(self, shapes: Mapping[str, Dims]) -> list[str]:
        """Return a message for each shape that the profile does not accept."""
        return [
            f"{name} {shape} is not within {self.least[name]} to {self.most[name]}"
            for name, shape in shapes.items()
            if not all(
                low <= size <= high for low, size, high in zip(self.least[name], shape, self.most[name], strict=True)
            )
        ]


class RunningEngine:
    """A plan in device memory. One thread runs it; any may close it after the last run."""

    def __init__(self, trt: TensorRT, pulled: Pulled, stepping: Stepping, device: torch.device) -> None:
        """Load a plan. Raises IntegrityError for a corrupt one, Refused for one of another GPU, version or graph,
        OutOfMemory.
        """
        self.manifest: GraphManifest = pulled.manifest
        self._trt, self._stepping, self._device = trt, stepping, device
        self._log = BuildLog()
        self._logger = logger(trt, self._log)
        self._runtime = trt.Runtime(self._logger)
        plan = pulled.plan.read_bytes()
        self._rtx = rtx = pulled.stored.key.flavour.is_rtx
        if rtx:
            self._check_validity(plan)
        self._engine = self._deserialize(plan)
        self._check_tensors()
        self._cache_file = pulled.runtime_cache if rtx else None
        self._cache: RuntimeCache | None = None
        self._how = self._runtime_config() if rtx else trt.ExecutionContextAllocationStrategy.USER_MANAGED
        count = self._engine.num_optimization_profiles
        self.limits = tuple(self._limits(index) for index in range(count))
        self.graph_limits = GraphLimits(self.manifest.graph, tuple(map(self._axis_ranges, self.limits)))
        self._contexts: dict[int, ExecutionContext] = {}
        self._owner = object()
        weakref.finalize(self, stepping.graphs.drop, self._owner)

    def profile_for(self, shapes: Mapping[str, Dims]) -> int:
        """Return the first profile that accepts these shapes. Raises Refused, naming what is outside
        the nearest one.
        """
        for index, limits in enumerate(self.limits):
            if limits.hold(shapes):
                return index
        nearest = min((limits.outside(shapes) for limits in reversed(self.limits)), key=len)
        raise Refused(
            f"the request is outside what the engine of {self.manifest.graph} was built for: {'; '.join(nearest)}; "
            "use a smaller picture or fewer images, or build with a wider --profile",
            graph=self.manifest.graph,
        )

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the engine. Feeds are cast to their input's dtype. The next run of any engine of this thread overwrites
        the results.

        Raises Refused outside every profile, OutOfMemory, ScumbleError if the device fails.
        """
        shapes = {port.name: tuple(feeds[port.name].shape) for port in self.manifest.inputs}
        index = self.profile_for(shapes)
        context = self._context(index)
        buffers = self._stepping.buffers
        inputs = {
            port.name: buffers.fill(f"in.{port.name}", feeds[port.name], TORCH[port.dtype])
            for port in self.manifest.inputs
        }
        self._set_shapes(context, shapes)
        outputs = {
            port.name: buffers.take(f"out.{port.name}", tuple(context.get_tensor_shape(port.name)), TORCH[port.dtype])
            for port in self.manifest.outputs
        }
        scratch = buffers.take("scratch", (max(context.update_device_memory_size_for_shapes(), 1),), torch.uint8)
        tensors = inputs | outputs
        key = (self._owner, index, tuple(shapes.items()), scratch.data_ptr(), *(t.data_ptr() for t in tensors.values()))

        def to_capture() -> Callable[[], None] | None:
            own = self._make_context(index)  # a context has state that follows its last shapes: a graph has one alone
            self._set_shapes(own, shapes)
            work = self._bind(own, tensors, scratch)
            return work if self._may_be_captured(own) else None

        self._log.errors.clear()
        with faults(f"a run of {self.manifest.graph}"):
            self._stepping.graphs.run(key, self._bind(context, tensors, scratch), to_capture)
        return outputs

    def _set_shapes(self, context: ExecutionContext, shapes: Mapping[str, Dims]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"TensorRT refused input {name} {shape}")

    def _bind(self, context: ExecutionContext, tensors: Mapping[str, Tensor], scratch: Tensor) -> Callable[[], None]:
        """Give a context its addresses now, and return what runs it there: a capture may hold the run alone."""
        context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"TensorRT refused the address of {name}")

        def work() -> None:
            if not context.execute_async_v3(stream_handle(self._device)):
                raise self._failure("a run failed")

        return work

    def _may_be_captured(self, context: ExecutionContext) -> bool:
        """TensorRT for RTX says it of a context; full TensorRT's engines may always be."""
        return not self._rtx or context.is_stream_capturable(stream_handle(self._device))

    def close(self) -> None:
        """Save the kernels compiled for this GPU, and free contexts and graphs."""
        self._write_runtime_cache()
        self._stepping.graphs.drop(self._owner)
        self._contexts.clear()

    def _write_runtime_cache(self) -> None:
        """Write the cache beside the plan, by rename, so that the next start compiles nothing. If it cannot be written
        (a full disk), only that start is slow again.
        """
        if self._cache is None or self._cache_file is None:
            return
        try:
            write_whole(self._cache_file, memoryview(self._cache.serialize()))
        except (OSError, RuntimeError) as error:
            log.warning("the runtime cache of %s was not written: %s", self.manifest.graph, error)

    def _check_validity(self, plan: bytes) -> None:
        """Check from the header of a plan for RTX that it runs on this machine. Raises Refused."""
        validity, reasons = self._runtime.get_engine_validity(plan)
        if validity.name == "INVALID":
            raise Refused(
                f"the engine of {self.manifest.graph} does not run here ({reasons:#x}: {self._errors()}): it is "
                "for another GPU, driver or TensorRT; run `scumble build engine` here",
                graph=self.manifest.graph,
            )

    def _deserialize(self, plan: bytes) -> Engine:
        with faults(f"the engine of {self.manifest.graph}"), alone():
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            return engine
        errors = self._errors()
        if self._log.ran_out_of_memory:
            give_back_memory()
            raise OutOfMemory(f"the engine of {self.manifest.graph} does not fit into device memory: {errors}")
        if any(sign in errors for sign in ("driver", "no CUDA-capable device", "cudaError")):
            raise Unavailable(f"the GPU or its driver does not support the engine of {self.manifest.graph}: {errors}")
        if any(sign in errors.lower() for sign in ("version", "compute capability", "platform")):
            raise Refused(
                f"the engine of {self.manifest.graph} is for another GPU or TensorRT: {errors}; build it again here",
                graph=self.manifest.graph,
            )
        raise IntegrityError(f"the plan of {self.manifest.graph} is corrupt: {errors}; build it again")

    def _check_tensors(self) -> None:
        """Check that the engine has the manifest's tensors. Raises Refused if not."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        parsed = {name: DTYPES.get(self._engine.get_tensor_dtype(name).name, "?") for name in names}
        promised = {port.name: port.dtype for port in (*self.manifest.inputs, *self.manifest.outputs)}
        if parsed != promised:
            different = sorted(parsed.items() ^ promised.items())
            raise Refused(
                f"the engine of {self.manifest.graph} is not what its manifest says: {different}; build it again"
            )

    def _runtime_config(self) -> Any:
        config = self._engine.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        # At once: a graph that is captured while a slower stand-in runs would keep the stand-in.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = self._cache = config.create_runtime_cache()
        if (
            self._cache_file is not None
            and self._cache_file.is_file()
            and not self._cache.deserialize(self._cache_file.read_bytes())
        ):
            log.info("the runtime cache of %s is for another driver or GPU; it is built again", self.manifest.graph)
        config.set_runtime_cache(cache)
        return config

    def _limits(self, index: int) -> ShapeLimits:
        shapes = {port.name: self._engine.get_tensor_profile_shape(port.name, index) for port in self.manifest.inputs}
        return ShapeLimits(
            {name: tuple(least) for name, (least, _, _) in shapes.items()},
            {name: tuple(most) for name, (_, _, most) in shapes.items()},
        )

    def _axis_ranges(self, limits: ShapeLimits) -> dict[str, range]:
        return {
            dim: range(limits.least[port.name][position], limits.most[port.name][position] + 1)
            for port in self.manifest.inputs
            for position, dim in enumerate(port.dims)
            if isinstance(dim, str)
        }

    def _context(self, index: int) -> ExecutionContext:
        """Return the context of a profile for runs that are not captured, made on first use."""
        if index not in self._contexts:
            self._contexts[index] = self._make_context(index)
        return self._contexts[index]

    def _make_context(self, index: int) -> ExecutionContext:
        with faults(f"a context of {self.manifest.graph}"), alone():
            context = self._engine.create_execution_context(self._how)
        if context is None:
            raise self._failure("TensorRT could not create a context")
        if not context.set_optimization_profile_async(index, stream_handle(self._device)):
            raise self._failure(f"TensorRT refused profile {index}")
        return context

    def _failure(self, what: str) -> ScumbleError:
        errors = self._errors()
        if self._log.ran_out_of_memory:
            give_back_memory()  # torch's reserve is of no use to TensorRT
            return OutOfMemory(f"device memory ran out in {self.manifest.graph}: {errors}")
        return ScumbleError(f"{self.manifest.graph}: {what}: {errors}")

    def _errors(self) -> str:
        errors: Sequence[str] = self._log.errors[-3:]
        return "; ".join(errors) or "TensorRT gives no reason"
