"""What is exported runs in ONNX Runtime as the very modules run in torch, at sizes that it was not traced with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from scumble.errors import InvalidRequest, Refused
from scumble_build.cli import app
from scumble_build.export.cached import GraphCache, key
from scumble_build.export.command import find_base, open_base
from scumble_build.export.control import NetGraphs
from scumble_build.export.denoiser import GRAPHS, graph_for
from scumble_build.export.graph import DTYPES
from scumble_build.export.manifest import GraphManifest, Port
from scumble_build.export.tracing.trace import trace
from scumble_build.export.write import Exportable, write_graphs
from support.control_nets import load_unet, make_net, make_union
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_ip import make_image_encoder

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""Of the largest output: half precision, rounded at other places."""

SIZES = (
    {"rows": 1, "height": 8, "width": 8, "tokens": 77, "resident": 1, "rank_pages": 1, "groups": 1, "image_tokens": 1},
    {
        "rows": 5,
        "height": 10,
        "width": 7,
        "tokens": 154,
        "resident": 6,
        "rank_pages": 4,
        "groups": 3,
        "image_tokens": 9,
    },
)


def some(port: Port, shape: Sequence[int], sizes: dict[str, int]) -> Tensor:
    """Random, and sound: a page that is there, a mask that leaves something."""
    dtype = DTYPES[port.dtype]
    if dtype.is_floating_point:
        return (0.2 * torch.randn(*shape)).to(dtype)
    if dtype == torch.bool:
        there = torch.rand(*shape) > 0.3
        there[..., 0] = True
        return there
    below = {"pages": sizes.get("resident", 1), "pages_rest": 64, "skip": 2, "pool": 77, "kinds": 2}.get(port.name, 500)
    return torch.randint(0, below, tuple(shape))


def largest_difference(graphs: Exportable, manifest: GraphManifest, folder: Path, sizes: dict[str, int]) -> float:
    """Between the file and the module, as a part of the largest output."""
    sizes = {name: size for name, size in sizes.items() if name in manifest.axes}
    for side in ("height", "width"):
        if f"pixel_{side}" in manifest.axes:
            sizes[f"pixel_{side}"] = 8 * {"height": 5, "width": 3}[side]
    shapes = manifest.shapes(sizes)
    feeds = {port.name: some(port, shapes[port.name], sizes) for port in manifest.inputs}
    with torch.inference_mode():
        expected = graphs.graph(manifest.graph).module(*feeds.values())
    session = ort.InferenceSession(folder / manifest.onnx.name, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == [port.name for port in manifest.inputs]
    found = session.run([port.name for port in manifest.outputs], {name: each.numpy() for name, each in feeds.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    return max(
        float(np.abs(ours - theirs.numpy()).max()) / max(1.0, float(theirs.abs().max()))
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    found = {"sd1": tiny_base, "sd2": make_tiny_sd2(folder / "sd2"), "sdxl": make_tiny_sdxl(folder / "sdxl")}
    make_image_encoder(found["sd2"] / "image_encoder")
    return found


def export(base: Path, folder: Path, names: Sequence[str], precision: Any = "fp32") -> tuple[Any, Any]:
    found = find_base(str(base), folder)
    graphs = open_base(found, precision)
    return graphs, write_graphs(graphs, names, folder, base=found.digest, family=found.family)


PARTS = {
    "sd1": ("text_encoder", "kv_projection", "unet.small", "vae_decoder", "vae_encoder"),
    "sd2": ("unet.bare", "image_encoder"),
    "sdxl": ("text_encoder_2", "unet.small"),
}


@pytest.mark.parametrize("family", PARTS)
def test_every_part_of_a_family_equals_torch(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    torch.manual_seed(1)
    graphs, manifests = export(bases[family], tmp_path, PARTS[family])
    for manifest in manifests:
        for sizes in SIZES:
            assert largest_difference(graphs, manifest, tmp_path, sizes) <= TOLERANCE, manifest.graph


def test_half_precision_keeps_norms_in_float32_and_stays_near(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(2)
    graphs, manifests = export(bases["sd2"], tmp_path, ["unet.bare"], "fp16")
    for manifest in manifests:
        assert {"norms", "attention"} <= set(manifest.kept_in_fp32)
        for sizes in SIZES:
            assert largest_difference(graphs, manifest, tmp_path, sizes) <= HALF_TOLERANCE, manifest.graph


def test_bfloat16_is_typed_throughout(bases: dict[str, Path], tmp_path: Path) -> None:
    _, (manifest,) = export(bases["sd1"], tmp_path, ["kv_projection"], "bf16")
    model = onnx.load(tmp_path / manifest.onnx.name)
    onnx.checker.check_model(model, full_check=True)
    assert {each.data_type for each in model.graph.initializer} == {onnx.TensorProto.BFLOAT16}


def test_the_vae_of_sdxl_stays_in_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    _, (manifest,) = export(bases["sdxl"], tmp_path, ["vae_decoder"], "fp16")
    assert manifest.precision == "fp32" and manifest.kept_in_fp32 == ("everything",)


@pytest.mark.parametrize("make", [make_net, make_union])
def test_a_controlnet_equals_torch(bases: dict[str, Path], tmp_path: Path, make: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    graphs = NetGraphs.of(make(load_unet(bases["sdxl"]), 1), "fp32")
    manifests = write_graphs(graphs, graphs.names, tmp_path, base="sha256:net", family="sdxl")
    assert [each.graph for each in manifests][-1] == "controlnet_condition"
    for manifest in manifests:
        for sizes in SIZES:
            assert largest_difference(graphs, manifest, tmp_path, sizes) <= TOLERANCE, manifest.graph


def test_the_manifest_says_what_the_file_is(bases: dict[str, Path], tmp_path: Path) -> None:
    graphs, (manifest,) = export(bases["sd1"], tmp_path, ["kv_projection"])
    model = onnx.load(tmp_path / "kv_projection.onnx", load_external_data=False)
    assert GraphManifest.read(tmp_path / "kv_projection.json") == manifest
    assert {each.name for each in model.graph.initializer} == set(manifest.parameters)
    places = [entry for each in model.graph.initializer for entry in each.external_data]
    assert {entry.value for entry in places if entry.key == "location"} == {"unet.safetensors"}
    for value, port in zip(model.graph.input, manifest.inputs, strict=True):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (port.name, list(port.dims))
    layout = graphs.projection.layout
    assert manifest.factors is not None
    assert manifest.factors.total_in + manifest.factors.rest_in == layout.full.total_in
    assert {each.name for each in manifest.factors.targets} == set(layout.targets)


def test_the_manifest_says_which_exporter_made_the_file(bases: dict[str, Path], tmp_path: Path) -> None:
    _, manifests = export(bases["sd1"], tmp_path, ["vae_decoder", "unet.bare"])
    nodes = {
        each.graph: onnx.load(tmp_path / each.onnx.name, load_external_data=False).graph.node for each in manifests
    }
    by_path = {graph for graph, each in nodes.items() if any(node.name.startswith("/") for node in each)}
    assert by_path == {"unet.bare"}, "TorchScript's exporter alone names nodes by their modules' paths"
    assert {each.graph: each.exporter for each in manifests} == {
        "vae_decoder": "torch.export",
        "unet.bare": "torchscript",
    }


def test_profiles_come_of_the_axes(bases: dict[str, Path], tmp_path: Path) -> None:
    _, (manifest,) = export(bases["sd1"], tmp_path, ["vae_decoder"])
    least, _, most = manifest.profile()["latents"]
    assert least == (1, 4, 1, 1) and most[0] == manifest.axes["rows"].max
    with pytest.raises(InvalidRequest, match="rows"):
        manifest.shapes({"rows": 1000})


def test_each_graph_takes_all_that_the_one_before_takes() -> None:
    chain = [set(includes) for includes in GRAPHS.values()]
    assert all(one < other for one, other in pairwise(chain))
    assert graph_for(frozenset()) == "bare"
    assert graph_for(frozenset({"images", "full"})) == "full"
    assert graph_for(frozenset({"stretch_in"})) == "every"


def test_a_graph_is_traced_once_for_all_bases_of_a_structure(
    bases: dict[str, Path], tmp_path: Path, make_tiny_base: Callable[..., Path]
) -> None:
    cache = GraphCache(tmp_path / "cache")
    one = open_base(find_base(str(bases["sd1"]), tmp_path), "fp32")
    other = open_base(find_base(str(make_tiny_base(tmp_path / "other", seed=9)), tmp_path), "fp32")
    name = "kv_projection"

    def never() -> Any:
        raise AssertionError("it is there already")

    first = cache.traced(lambda: one.graph(name), name, "fp32", one.config(name))
    assert cache.traced(never, name, "fp32", other.config(name)).parameters == first.parameters
    (file,) = (tmp_path / "cache").glob("*.onnx")
    assert file.stem == key(name, "fp32", one.config(name)) != key(name, "fp16", one.config(name))
    file.write_bytes(b"damaged")
    assert cache.traced(lambda: one.graph(name), name, "fp32", one.config(name)).parameters == first.parameters


@pytest.mark.parametrize("name", ["unet.bare", "text_encoder"])
def test_weights_of_equal_values_stay_apart_for_bases_where_they_differ(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    graph = open_base(find_base(str(bases["sd1"]), tmp_path), "fp32").graph(name)
    norms = {each for each in graph.parameters if "norm" in each}
    assert norms and norms <= set(trace(graph).parameters.values()), "fresh norms are all ones"


def test_the_command_writes_what_is_asked_for(bases: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["export", "--base", str(bases["sd1"]), "-o", str(tmp_path), "--part", "vae_decoder", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert json.loads(result.stdout.splitlines()[-1])["graphs"] == ["vae_decoder"]
    wrong = CliRunner().invoke(app, [*arguments[:-2], "unet.tiny"])
    assert isinstance(wrong.exception, InvalidRequest) and "unet.bare" in wrong.exception.message


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(Refused, match="export it again"):
        GraphManifest.read(tmp_path / "a.json")
