"""Writes a base's graphs to a folder: ONNX files, their weights and manifests.

    DIR/unet.safetensors, text_encoder.safetensors, vae.safetensors     weights, in the graphs' precision
    DIR/unet.small.onnx, unet.small.json, …                             a graph and its manifest

A graph reads its weights from its component's file: safetensors is a header followed by plain tensors, which ONNX can
reference. A graph's manifest is written last, so a graph with a manifest is complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import onnx
from safetensors.torch import save_file
from torch import Tensor

from scumble.errors import InvalidRequest
from scumble_build.export.graph import Graph
from scumble_build.export.manifest import SUFFIX, File, GraphManifest, KVPlace
from scumble_build.export.plan import component_of
from scumble_build.export.provenance import code_digest, versions
from scumble_build.export.quantise import quantise_traced
from scumble_build.export.tracing.trace import exporter_of, trace
from scumble_build.export.tracing.traced import OPSET, ByteRange, locate
from scumble_registry.compatibility import Family
from scumble_registry.formats.safetensors_header import read_header


class Exportable(Protocol):
    """The graphs of a base (`plan.BaseGraphs`) or of a ControlNet (`control.NetGraphs`)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def states(self) -> Mapping[str, Mapping[str, Tensor]]: ...

    def graph(self, name: str) -> Graph: ...


def write_graphs(
    graphs: Exportable,
    names: Sequence[str],
    folder: Path,
    *,
    base: str,
    family: Family,
    report: Callable[[GraphManifest], None] = lambda _: None,
    maxima: Mapping[str, float] | None = None,
) -> tuple[GraphManifest, ...]:
    """Write the graphs `names`. `report` is called with each manifest when it is written.

    With `maxima` (of each product's input states, by its weight's name), the denoiser's products are in int8.
    Raises InvalidRequest for an unknown name, and for a product without a maximum.
    """
    if unknown := [name for name in names if name not in graphs.names]:
        raise InvalidRequest(f"there is no graph {unknown[0]!r}; there are {', '.join(graphs.names)}", field="part")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, File] = {}
    manifests = []
    for name in names:
        component = component_of(name)
        if component not in files:
            files[component] = _write_weights(graphs.states[component], folder / f"{component}.safetensors")
        manifest = _write_graph(graphs.graph(name), folder, files[component], base=base, family=family, maxima=maxima)
        report(manifest)
        manifests.append(manifest)
    return tuple(manifests)


def _write_weights(state: Mapping[str, Tensor], file: Path) -> File:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, file)
    return _describe(file)


def _write_graph(
    graph: Graph, folder: Path, weights: File, *, base: str, family: Family, maxima: Mapping[str, float] | None
) -> GraphManifest:
    traced = trace(graph)
    in_int8: tuple[str, ...] = ()
    if maxima is not None and graph.part == "denoiser":
        in_int8 = quantise_traced(traced, graph.parameters, maxima)
    places = places_in(folder / weights.name)
    locate(traced.model, {own: places[name.partition(".")[2]] for own, name in traced.parameters.items()})
    file = folder / f"{graph.name}.onnx"
    onnx.save_model(traced.model, file)
    manifest = describe(graph, traced.parameters, base=base, family=family, onnx=_describe(file), weights=weights)
    manifest = manifest.model_copy(update={"in_int8": in_int8})
    manifest.write(folder / f"{graph.name}{SUFFIX}")
    return manifest


def describe(
    graph: Graph, parameters: Mapping[str, str], *, base: str, family: Family, onnx: File, weights: File
) -> GraphManifest:
    return GraphManifest(
        part=graph.part,
        graph=graph.name,
        includes=graph.includes,
        family=family,
        base=base,
        precision=graph.precision,
        kept_in_fp32=graph.kept_in_fp32,
        opset=OPSET,
        exporter=exporter_of(graph.part),
        made_with=versions(),
        code=code_digest(),
        inputs=graph.inputs,
        outputs=graph.outputs,
        axes=dict(graph.axes),
        levels=graph.levels,
        factors=graph.factors,
        kv=tuple(KVPlace(name=kv.name, offset=kv.offset, width=kv.width) for kv in graph.kv),
        parameters=dict(parameters),
        onnx=onnx,
        weights=weights,
    )


def places_in(file: Path) -> dict[str, ByteRange]:
    """Return the byte range of each tensor in a safetensors file."""
    header = read_header(file)
    return {
        name: ByteRange(file.name, header.data_start + info.begin, info.end - info.begin)
        for name, info in header.tensors.items()
    }


def _describe(file: Path) -> File:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(name=file.name, sha256=digest, size=file.stat().st_size)
