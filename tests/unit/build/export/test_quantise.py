"""A base's products in int8, its adapters as they are: how far the graph moves, and that TensorRT takes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner

from scumble.errors import InvalidRequest
from scumble_build.cli import app
from scumble_build.engines.api import Flavour
from scumble_build.export.command import find_base, open_base
from scumble_build.export.manifest import GraphManifest
from scumble_build.export.quantise import quantise
from scumble_build.export.write import write_graphs
from scumble_build.graphs.adapted import Adapted
from support.tensorrt_here import check_parses, needs_rtx

GRAPH = "unet.small"


@dataclass
class Exported:
    folder: Path
    manifest: GraphManifest
    feeds: dict[str, np.ndarray]
    maxima: dict[str, float]

    def load(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        model = onnx.load(self.folder / self.manifest.onnx.name)
        named = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        weights = {name: each for name, each in named.items() if name in self.manifest.parameters and each.ndim > 1}
        return model, weights


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With the maxima of one step, as a calibration would note them over many."""
    folder = tmp_path_factory.mktemp("graphs")
    base = find_base(str(tiny_base), folder)
    graphs = open_base(base, "fp32")
    (manifest,) = write_graphs(graphs, [GRAPH], folder, base=base.digest, family=base.family)
    graph = graphs.graph(GRAPH)
    seen: dict[str, float] = {}

    def note(name: str) -> Any:
        return lambda _layer, given: seen.__setitem__(name, float(given[0].abs().max()))

    layers = {name: layer for name, layer in graph.module.named_modules() if isinstance(layer, Adapted)}
    for layer in layers.values():
        layer.base.register_forward_pre_hook(note(f"{layer.target.name}.weight"))
    examples = list(graph.examples())
    scale = [port.name for port in manifest.inputs].index("scale")
    examples[scale] = examples[scale] * 16  # so that what the factors do is more than rounding
    with torch.no_grad():
        graph.module(*examples)
    maxima = {own: seen[theirs] for own, theirs in manifest.parameters.items() if theirs in seen}
    feeds = {port.name: each.numpy() for port, each in zip(manifest.inputs, examples, strict=True)}
    return Exported(folder, manifest, feeds, maxima)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    return found


def test_a_step_in_int8_stays_near_and_a_lora_acts_as_before(exported: Exported) -> None:
    plain, weights = exported.load()
    made = quantise(exported.load()[0], weights, exported.maxima)
    assert len(made.products) > 20
    without = exported.feeds | {"scale": np.zeros_like(exported.feeds["scale"])}
    exact, near = (run(model, exported.feeds) for model in (plain, made.model))
    exact_bare, near_bare = (run(model, without) for model in (plain, made.model))
    assert 0 < np.linalg.norm(near - exact) < 0.15 * np.linalg.norm(exact)
    effect, kept = exact - exact_bare, near - near_bare
    assert (effect * kept).sum() / np.linalg.norm(effect) / np.linalg.norm(kept) > 0.9


def test_only_the_bases_products_are_quantised(exported: Exported) -> None:
    model, weights = exported.load()
    made = quantise(model, weights, exported.maxima)
    fed = {port.name for port in exported.manifest.inputs}
    quantised = [node for node in made.model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == 2 * len(made.products)
    assert not fed & {name for node in quantised for name in node.input}
    assert not any("conv_in" in name or "time_emb" in name for name in made.products)


def test_a_product_without_a_maximum_is_refused(exported: Exported) -> None:
    model, weights = exported.load()
    with pytest.raises(InvalidRequest, match="no calibrated maximum"):
        quantise(model, weights, {})


@needs_rtx
def test_tensorrt_reads_the_quantised_graph_as_the_manifest_says(exported: Exported, tmp_path: Path) -> None:
    model, weights = exported.load()
    path = tmp_path / "quantised.onnx"
    onnx.save(quantise(model, weights, exported.maxima).model, path)
    check_parses(path, exported.manifest, Flavour.TENSORRT_RTX)


def test_the_command_writes_the_graph_in_int8_and_says_so(exported: Exported, tiny_base: Path, tmp_path: Path) -> None:
    named = {exported.manifest.parameters[own]: maximum for own, maximum in exported.maxima.items()}
    file = tmp_path / "maxima.json"
    file.write_text(json.dumps(named))
    arguments = ["export", "--base", str(tiny_base), "-o", str(tmp_path / "graphs"), "--part", GRAPH]
    CliRunner().invoke(app, [*arguments, "--int8", str(file)], catch_exceptions=False, standalone_mode=False)
    manifest = GraphManifest.read(tmp_path / "graphs" / f"{GRAPH}.json")
    assert set(manifest.in_int8) <= set(named) and len(manifest.in_int8) > 20
    assert exported.manifest.in_int8 == ()
    plain, weights = exported.load()
    by_hand = run(quantise(plain, weights, exported.maxima).model, exported.feeds)
    session = onnxruntime.InferenceSession(str(tmp_path / "graphs" / manifest.onnx.name))
    assert np.abs(session.run(None, exported.feeds)[0] - by_hand).max() <= 1e-5


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        ("{}", (), r"no calibrated maximum for unet\."),
        ("[1]", (), "must be a JSON object"),
        ("{", (), "is not JSON"),
        ("{}", ("--precision", "fp16"), "--precision fp32"),
    ],
)
def test_the_command_refuses_what_it_cannot_quantise(
    tiny_base: Path, tmp_path: Path, content: str, more: tuple[str, ...], says: str
) -> None:
    (tmp_path / "maxima.json").write_text(content)
    arguments = ["export", "--base", str(tiny_base), "-o", str(tmp_path / "graphs"), "--part", GRAPH]
    with pytest.raises(InvalidRequest, match=says):
        CliRunner().invoke(
            app,
            [*arguments, "--int8", str(tmp_path / "maxima.json"), *more],
            catch_exceptions=False,
            standalone_mode=False,
        )
