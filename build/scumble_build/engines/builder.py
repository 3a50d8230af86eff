"""Builds an engine's plan from a graph and its manifest. What TensorRT parsed must match the manifest.

TensorRT for RTX builds for a named compute capability on any machine; TensorRT builds for the GPU that it runs on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scumble.errors import OutOfMemory, Refused, ScumbleError
from scumble.files import write_whole
from scumble_build.engines.api import Builder, BuilderConfig, Flavour, Network, NetworkTensor, TensorRT, load
from scumble_build.engines.memory import Peak
from scumble_build.engines.profiles import Profile
from scumble_build.engines.progress import BuildLog, Progress, logger, monitor
from scumble_build.export.manifest import GraphManifest, Port

log = logging.getLogger(__name__)

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "BOOL": "bool"}
"""TensorRT's names → the manifest's."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """BuildOptions of a build. All but `timing_cache` are part of an engine's key.

    `workspace` limits the scratch memory of a kernel, in bytes (None: no limit).
    """

    optimization_level: int = 3
    workspace: int | None = None
    timing_cache: Path | None = None
    """TensorRT only: kernel timings, kept from build to build."""

    def flags(self) -> dict[str, Any]:
        return {"optimization_level": self.optimization_level, "workspace": self.workspace}


@dataclass(frozen=True, slots=True)
class Report:
    """Seconds, and bytes: of the plan, of this process at its peak, and of device memory as TensorRT reports it."""

    parse_seconds: float
    build_seconds: float
    layers: int
    plan_bytes: int
    peak_bytes: int
    memory: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(
    onnx: Path,
    manifest: GraphManifest,
    plan: Path,
    *,
    flavour: Flavour,
    sm: Sequence[int],
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    progress: Progress = lambda _phase, _done: None,
) -> Report:
    """Build an engine and write it to `plan`.

    Raises Refused for a graph, a shape or a GPU that TensorRT does not support, Unavailable if the flavour is not
    installed, OutOfMemory. Nothing is written on failure.
    """
    options = options or BuildOptions()
    trt, messages = load(flavour), BuildLog()
    shapes = [profile.shapes(manifest) for profile in profiles]
    trt_logger = logger(trt, messages)
    with Peak() as peak:
        start = time.monotonic()
        builder = trt.Builder(trt_logger)
        network = parse_network(trt, builder, onnx, manifest, trt_logger, messages)
        parsed = time.monotonic()
        config = _configure(trt, builder, flavour, sm, options)
        for number, inputs in enumerate(shapes):
            profile = builder.create_optimization_profile()
            for name, (least, usual, most) in inputs.items():
                profile.set_shape(name, least, usual, most)
            if config.add_optimization_profile(profile) < 0:
                raise Refused(f"{manifest.graph}: TensorRT refuses profile {number}; {_first_errors(messages)}")
        watch = config.progress_monitor = monitor(trt, progress)
        made = builder.build_serialized_network(network, config)
        if watch.failed is not None:
            raise watch.failed
        if made is None:
            raise _failure(manifest, messages)
        write_whole(plan, memoryview(made))
        _keep_timing_cache(config, flavour, options)
        built = time.monotonic()
    return Report(
        parsed - start,
        built - parsed,
        network.num_layers,
        plan.stat().st_size,
        peak.bytes,
        messages.memory,
        tuple(dict.fromkeys(messages.warnings)),
    )


def parse_network(
    trt: TensorRT, builder: Builder, onnx: Path, manifest: GraphManifest, trt_logger: Any, messages: BuildLog
) -> Network:
    """Parse a graph. Raises Refused if TensorRT does not support it, or parses other inputs or outputs than its
    manifest has.

    The network must not outlive `trt_logger`.
    """
    # TensorRT 11 and TensorRT for RTX have only strongly typed networks; older versions need the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, trt_logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        texts = [f"{error.node_name() or f'node {error.node()}'}: {error.desc()}" for error in errors]
        raise Refused(
            f"TensorRT does not support the graph {manifest.graph}: {'; '.join(texts) or _first_errors(messages)}"
        )
    check_parsed(network, manifest)
    return network


def check_parsed(network: Network, manifest: GraphManifest) -> None:
    """Check the parsed network against the manifest. Raises Refused, naming every difference."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    wrong = _differences("input", inputs, manifest.inputs) + _differences("output", outputs, manifest.outputs)
    if wrong:
        raise Refused(f"{manifest.graph} as TensorRT reads it is not what its manifest says: {'; '.join(wrong)}")


def _differences(what: str, parsed: Sequence[NetworkTensor], promised: Sequence[Port]) -> list[str]:
    names, expected = [tensor.name for tensor in parsed], [port.name for port in promised]
    if names != expected:
        return [f"{what}s are {names}, not {expected}"]
    wrong = []
    for tensor, port in zip(parsed, promised, strict=True):
        dtype = DTYPES.get(tensor.dtype.name, tensor.dtype.name)
        if dtype != port.dtype:
            wrong.append(f"{what} {port.name} is {dtype}, not {port.dtype}")
        shape = tuple(tensor.shape)
        if not _same(shape, port, exact=what == "input"):
            wrong.append(f"{what} {port.name} is {shape}, not {port.dims}")
    return wrong


def _same(shape: tuple[int, ...], port: Port, *, exact: bool) -> bool:
    """Compare dims. An input's must be equal; an output's may also be unknown (-1) on either side."""
    declared = tuple(-1 if isinstance(dim, str) else dim for dim in port.dims)
    if exact:
        return shape == declared
    pairs = zip(shape, declared, strict=False)
    return len(shape) == len(declared) and all(-1 in {here, there} or here == there for here, there in pairs)


def _configure(
    trt: TensorRT, builder: Builder, flavour: Flavour, sm: Sequence[int], options: BuildOptions
) -> BuilderConfig:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if flavour.is_rtx:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that a run may be captured as a CUDA graph
        config.num_compute_capabilities = len(sm)
        for index, number in enumerate(sm):
            config.set_compute_capability(_capability(trt, number), index)
        return config
    here = current_sm()
    if (here,) != tuple(sm):
        raise Refused(
            f"TensorRT builds for the GPU that it runs on, which is {'none' if here is None else f'SM{here}'} here, "
            f"not SM{', SM'.join(map(str, sm))}; build there, or with --flavour tensorrt_rtx",
            sm=list(sm),
        )
    if options.timing_cache is not None:
        content = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
    return config


def _capability(trt: TensorRT, sm: int) -> Any:
    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        known = sorted(name for name in dir(trt.ComputeCapability) if _names_one(name))
        raise Refused(
            f"TensorRT for RTX {trt.__version__} builds for {', '.join(known)}, not for SM{sm}; "
            "there, build with --flavour tensorrt on the GPU itself",
            sm=sm,
        )
    return capability


def _names_one(name: str) -> bool:
    return name.startswith("SM") and name[2:].isdigit()


def current_sm() -> int | None:
    """Return the compute capability of this machine's GPU, 89 for 8.9; None if torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _keep_timing_cache(config: BuilderConfig, flavour: Flavour, options: BuildOptions) -> None:
    if flavour.is_rtx or options.timing_cache is None:  # TensorRT for RTX times no kernels when building
        return
    cache = config.get_timing_cache()
    if cache is not None:
        write_whole(options.timing_cache, memoryview(cache.serialize()))


def _failure(manifest: GraphManifest, messages: BuildLog) -> ScumbleError:
    if messages.ran_out_of_memory:
        return OutOfMemory(
            f"building {manifest.graph} ran out of memory: {_first_errors(messages)}; use a profile with smaller sizes "
            "(--profile) or a smaller --workspace"
        )
    return Refused(f"TensorRT could not build {manifest.graph}: {_first_errors(messages)}")


def _first_errors(messages: BuildLog) -> str:
    return "; ".join(messages.errors[:3]) or "it gives no reason"
