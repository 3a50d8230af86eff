"""Runs exported graphs and a plain export of diffusers' UNet: in TensorRT on a GPU, in ONNX Runtime on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from scumble_build.engines import api
from scumble_build.engines.api import Flavour
from scumble_build.engines.base import BuildTarget, build_graphs
from scumble_build.engines.builder import current_sm
from scumble_build.engines.profiles import Profile, Range
from scumble_build.engines.store import Pulled, StoredEngine
from scumble_build.export.cached import GraphCache
from scumble_build.export.graph import DTYPES, PRECISIONS, Graph
from scumble_build.export.manifest import FLOAT, GraphManifest, Port, Precision
from scumble_build.export.ports import HEIGHT, ROWS, SIZES, TIMESTEP, TOKENS, WIDTH
from scumble_build.export.write import Exportable, write_graphs
from scumble_build.graphs.families import FAMILIES
from scumble_build.graphs.models import Models
from scumble_server.executors.device import Stepping
from scumble_server.executors.exported import ExportedExecutor
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.tensorrt.engine import RunningEngine
from scumble_server.executors.tensorrt.engines import EngineRuntime, Engines
from scumble_server.executors.tensorrt.executor import TensorRTExecutor
from scumble_server.executors.torch.executor import TorchExecutor

NO_BASE = "sha256:" + "0" * 64


@dataclass(frozen=True)
class ExportedUnet:
    """`plain` is the export of diffusers' UNet, which reads text states instead of keys and values."""

    runtime: str
    executor: ExportedExecutor
    plain: Callable[[Mapping[str, Tensor]], object]


def make(
    models: Models, family: str, precision: Precision, latents: int, device: torch.device, work: Path
) -> ExportedUnet:
    """Export and load `models`, which are on the CPU in `precision` and are changed. Raises Unavailable on a GPU
    without TensorRT.
    """
    plain = PlainGraphs(copy.deepcopy(models.unet), precision)
    cpu = torch.device("cpu")
    weights = TorchExecutor(models, FAMILIES[family], cpu, PRECISIONS[precision], 64)  # type: ignore[index]
    if device.type == "cpu":
        (manifest,) = write_graphs(plain, plain.names, work, base=NO_BASE, family=family)  # type: ignore[arg-type]
        session = onnxruntime.InferenceSession(work / manifest.onnx.name, providers=["CPUExecutionProvider"])
        return ExportedUnet(
            "onnxruntime",
            OnnxRuntimeExecutor(weights, GraphCache(work / "cache")),
            lambda feeds: session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()}),
        )
    trt = api.load(Flavour.TENSORRT)
    names = (*weights.graphs.texts, "kv_projection", "unet.bare", "unet.small", "vae_decoder", "vae_encoder")
    engines = _engines(weights.graphs, names, family, precision, latents, work)
    running = Engines(weights.graphs, engines, EngineRuntime.on(trt, device, lambda: Stepping.on(device)))
    (pulled,) = _engines(plain, plain.names, family, precision, latents, work).values()
    engine = RunningEngine(trt, pulled, Stepping.on(device), device)
    return ExportedUnet(f"tensorrt {trt.__version__}", TensorRTExecutor(weights, running, {}), engine.run)


def _engines(
    graphs: Exportable, names: tuple[str, ...], family: str, precision: Precision, latents: int, work: Path
) -> dict[str, Pulled]:
    """Return the profile for one size and eight rows at most."""
    manifests = write_graphs(graphs, names, work, base=NO_BASE, family=family)  # type: ignore[arg-type]
    side, pixels, sm = Range(latents, latents, latents), Range(8 * latents, 8 * latents, 8 * latents), current_sm()
    assert sm is not None
    axes = {
        "rows": Range(1, 8, 8),
        "tokens": Range(77, 77, 77),
        **dict.fromkeys(("height", "width"), side),
        **dict.fromkeys(("pixel_height", "pixel_width"), pixels),
        "resident": Range(1, 64, 256),
        "rank_pages": Range(1, 2, 8),
    }
    built = build_graphs(
        work, manifests, BuildTarget(Flavour.TENSORRT, (sm,), precision, (Profile(axes),)), work / "plans"
    )
    return {
        engine.key.part: Pulled(StoredEngine(engine.key, None), GraphManifest.read(engine.manifest), engine.plan)  # type: ignore[arg-type]
        for engine in built
    }


class PlainGraphs:
    """Return diffusers' UNet without adapters as a graph for the same exporter."""

    names = ("unet.plain",)

    def __init__(self, unet: nn.Module, precision: Precision) -> None:
        self._unet: Any = unet.eval().requires_grad_(requires_grad=False)
        self._precision = precision
        self.states = {"unet": dict(unet.state_dict())}

    def graph(self, name: str) -> Graph:
        config, dtype = self._unet.config, FLOAT[self._precision]
        maps: tuple[int | str, ...] = ("rows", int(config.in_channels), "height", "width")
        states: tuple[int | str, ...] = ("rows", "tokens", int(config.cross_attention_dim))
        inputs = [
            Port(name="sample", dtype="float32", dims=maps, about="Latents."),
            TIMESTEP,
            Port(name="states", dtype=dtype, dims=states, about="Text states."),
        ]
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs += [Port(name="pooled", dtype=dtype, dims=("rows", pooled), about="The pooled text."), SIZES]
        axes = {"rows": ROWS, "tokens": TOKENS, "height": HEIGHT, "width": WIDTH}
        out = Port(name="prediction", dtype="float32", dims=maps, about="The base's prediction.")
        parameters = {f"unet.{key}": tensor for key, tensor in self.states["unet"].items()}
        module = _Plain(self._unet, DTYPES[dtype])
        return Graph(name, "denoiser", module, tuple(inputs), (out,), axes, self._precision, parameters)


class _Plain(nn.Module):
    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        more = {"text_embeds": added[0], "time_ids": added[1]} if added else {}
        prediction: Tensor = self.unet(
            sample.to(self.dtype), timestep, states, added_cond_kwargs=more, return_dict=False
        )[0]
        return prediction.float()


__all__ = ["ExportedUnet", "make"]
