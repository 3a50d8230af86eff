"""A graph and its manifest → an engine's plan. What TensorRT parsed must be what the manifest promises.

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
from scumble_build.engines.progress import Said, Tell, logger, monitor
from scumble_build.export.manifest import GraphManifest, Port

log = logging.getLogger(__name__)

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "BOOL": "bool"}
"""TensorRT's names → the manifest's."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a builder works. All but `timing_cache` is part of an engine's key.

    `workspace` in bytes bounds the scratch memory that a kernel may ask for (None: all that there is).
    """

    optimization_level: int = 3
    workspace: int | None = None
    timing_cache: Path | None = None
    """TensorRT only: measurements of kernels, kept from build to build."""

    def flags(self) -> dict[str, Any]:
        return {"optimization_level": self.optimization_level, "workspace": self.workspace}


@dataclass(frozen=True, slots=True)
class Report:
    """Seconds, and bytes: of the plan, of this process at its peak, and of device memory as TensorRT reckons it."""

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
    options: Options | None = None,
    tell: Tell = lambda _phase, _done: None,
) -> Report:
    """Writes `plan`. Raises Refused for a graph, a shape or a GPU that TensorRT does not take, Unavailable if the
    flavour is not installed, OutOfMemory; then nothing is written.
    """
    options = options or Options()
    trt, said = load(flavour), Said()
    shapes = [profile.shapes(manifest) for profile in profiles]
    keep = logger(trt, said)
    with Peak() as peak:
        start = time.monotonic()
        builder = trt.Builder(keep)
        network = parse_network(trt, builder, onnx, manifest, keep, said)
        parsed = time.monotonic()
        config = _configure(trt, builder, flavour, sm, options)
        for number, inputs in enumerate(shapes):
            profile = builder.create_optimization_profile()
            for name, (least, usual, most) in inputs.items():
                profile.set_shape(name, least, usual, most)
            if config.add_optimization_profile(profile) < 0:
                raise Refused(f"{manifest.graph}: TensorRT refuses profile {number}; {_first(said)}")
        watch = config.progress_monitor = monitor(trt, tell)
        made = builder.build_serialized_network(network, config)
        if watch.failed is not None:
            raise watch.failed
        if made is None:
            raise _failure(manifest, said)
        write_whole(plan, memoryview(made))
        _keep_timing_cache(config, flavour, options)
        built = time.monotonic()
    return Report(
        parsed - start,
        built - parsed,
        network.num_layers,
        plan.stat().st_size,
        peak.bytes,
        said.memory,
        tuple(dict.fromkeys(said.warnings)),
    )


def parse_network(
    trt: TensorRT, builder: Builder, onnx: Path, manifest: GraphManifest, keep: Any, said: Said
) -> Network:
    """Raises Refused for a graph that TensorRT does not take, or reads other than its manifest says.

    The network must not outlive `keep`, the logger.
    """
    # TensorRT 11 and TensorRT for RTX know no other kind of network; older ones must be told.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, keep)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        texts = [f"{error.node_name() or f'node {error.node()}'}: {error.desc()}" for error in errors]
        raise Refused(f"TensorRT does not take the graph {manifest.graph}: {'; '.join(texts) or _first(said)}")
    check_parsed(network, manifest)
    return network


def check_parsed(network: Network, manifest: GraphManifest) -> None:
    """Raises Refused, naming every difference between the parsed network and the manifest."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    wrong = _differences("input", inputs, manifest.inputs) + _differences("output", outputs, manifest.outputs)
    if wrong:
        raise Refused(f"{manifest.graph} as TensorRT reads it is not what its manifest says: {'; '.join(wrong)}")


def _differences(what: str, found: Sequence[NetworkTensor], promised: Sequence[Port]) -> list[str]:
    names, expected = [tensor.name for tensor in found], [port.name for port in promised]
    if names != expected:
        return [f"{what}s are {names}, not {expected}"]
    wrong = []
    for tensor, port in zip(found, promised, strict=True):
        dtype = DTYPES.get(tensor.dtype.name, tensor.dtype.name)
        if dtype != port.dtype:
            wrong.append(f"{what} {port.name} is {dtype}, not {port.dtype}")
        shape = tuple(tensor.shape)
        if not _same(shape, port, exact=what == "input"):
            wrong.append(f"{what} {port.name} is {shape}, not {port.dims}")
    return wrong


def _same(shape: tuple[int, ...], port: Port, *, exact: bool) -> bool:
    """An input's dims are as declared; an output's may be known less well than they are."""
    declared = tuple(-1 if isinstance(dim, str) else dim for dim in port.dims)
    if exact:
        return shape == declared
    pairs = zip(shape, declared, strict=False)
    return len(shape) == len(declared) and all(-1 in {here, there} or here == there for here, there in pairs)


def _configure(trt: TensorRT, builder: Builder, flavour: Flavour, sm: Sequence[int], options: Options) -> BuilderConfig:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if flavour.is_rtx:
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
    found = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if found is None:
        known = sorted(name for name in dir(trt.ComputeCapability) if _names_one(name))
        raise Refused(
            f"TensorRT for RTX {trt.__version__} builds for {', '.join(known)}, not for SM{sm}; "
            "there, build with --flavour tensorrt on the GPU itself",
            sm=sm,
        )
    return found


def _names_one(name: str) -> bool:
    return name.startswith("SM") and name[2:].isdigit()


def current_sm() -> int | None:
    """The compute capability of the GPU here, 89 for 8.9; None if torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _keep_timing_cache(config: BuilderConfig, flavour: Flavour, options: Options) -> None:
    if flavour.is_rtx or options.timing_cache is None:  # TensorRT for RTX measures nothing ahead, and asks for a GPU
        return
    cache = config.get_timing_cache()
    if cache is not None:
        write_whole(options.timing_cache, memoryview(cache.serialize()))


def _failure(manifest: GraphManifest, said: Said) -> ScumbleError:
    if said.ran_out_of_memory:
        return OutOfMemory(
            f"building {manifest.graph} ran out of memory: {_first(said)}; a profile with smaller sizes needs less "
            "(--profile), and so does --workspace"
        )
    return Refused(f"TensorRT could not build {manifest.graph}: {_first(said)}")


def _first(said: Said) -> str:
    return "; ".join(said.errors[:3]) or "it says no more"
