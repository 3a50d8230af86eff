"""The ONNX Runtime executor equals the torch executor: graphs, batches, sizes, ranks, every kind of input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scumble.errors import InvalidRequest, Refused, Unavailable
from scumble_build.export.denoiser import feature_places, residual_places
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.families import FAMILIES
from scumble_build.graphs.inputs import ContextInputs, ImageInputs, NetInputs, StepInputs, level_sizes
from scumble_build.graphs.layout import Layout
from scumble_build.graphs.text import Overrides, TextInputs
from scumble_server.config import ServerConfig
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.onnxruntime.sessions import check_available
from scumble_server.executors.protocol import NetModel
from scumble_server.executors.torch.executor import TorchExecutor
from support.control_nets import load_unet, make_net, make_union
from support.paging import some_factors
from support.places import DEMO_BASE
from support.tiny_families import make_tiny_sdxl

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""Of the largest value: half precision, rounded at other places."""


@dataclass(frozen=True)
class Pair:
    """Two executors of one base."""

    torch: TorchExecutor
    onnx: OnnxRuntimeExecutor
    folder: Path

    @property
    def kv_width(self) -> int:
        return sum(2 * place.width for place in self.torch.kv_slices)


def make_pair(folder: Path, family: str, cache: Path, precision: Any = "fp32") -> Pair:
    about = FAMILIES[family]  # type: ignore[index]
    return Pair(
        TorchExecutor.load(folder, about, "cpu", precision),
        OnnxRuntimeExecutor.load(folder, about, cache, "cpu", precision),
        folder,
    )


@pytest.fixture(scope="session")
def sd1(tiny_base: Path, graph_cache: Path) -> Pair:
    return make_pair(tiny_base, "sd1", graph_cache)


def factors(layout: Layout, rows: int, rank: int, *, sets: int, full: bool = False, stretch: bool = False) -> Factors:
    chosen = [row % sets for row in range(rows)]
    return some_factors(layout, chosen, rank, full=full, size=0.2, stretch=0.3 if stretch else 0.0)


def some_images(pair: Pair, rows: Tensor, size: tuple[int, int], *, groups: int) -> ImageInputs:
    places = level_sizes(*size, pair.torch.graphs.denoiser.levels)
    positions = sum(height * width for height, width in places)
    tokens = torch.rand(len(rows), groups, 5) > 0.3
    tokens[:, :, 0] = True
    kv = torch.randn(len(rows), groups, 5, pair.kv_width)
    return ImageInputs(rows, kv, tokens, torch.rand(len(rows), groups), torch.rand(len(rows), groups, positions))


def some_maps(places: list[tuple[int, int]], rows: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    sides = level_sizes(*size, 1 + max(level for _, level in places))
    return tuple(0.3 * torch.randn(rows, channels, *sides[level]) for channels, level in places)


def difference(pair: Pair, inputs: StepInputs, size: tuple[int, int]) -> float:
    rows = len(inputs.kv)
    sample, timestep = torch.randn(rows, 4, *size), torch.randint(0, 999, (rows,)).float()
    expected = pair.torch.denoise(sample, timestep, inputs)
    found = pair.onnx.denoise(sample, timestep, inputs)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def step_inputs(pair: Pair, rows: int, size: tuple[int, int], kind: str, tokens: int = 77) -> StepInputs:
    """What the rows of a batch may carry, of one kind."""
    layout, denoiser = pair.torch.step_layout, pair.torch.graphs.denoiser
    some = max(1, rows - 1)  # the others carry nothing
    sized = {}
    if pair.torch.graphs.denoiser.unet.config.addition_embed_type:  # type: ignore[union-attr]
        sized = {"pooled": torch.randn(rows, 40), "sizes": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * rows)}
    changes: dict[str, Any] = {
        "bare": {},
        "mask": {"kv_mask": torch.arange(tokens) < torch.randint(1, tokens, (rows, 1))},
        "small": {"factors": factors(layout, some, 8, sets=2)},
        "wide": {"factors": factors(layout, rows, 64, sets=min(rows, 3))},
        "full": {"factors": factors(layout, some, 16, sets=2, full=True)},
        "dora": {"factors": factors(layout, some, 8, sets=1, full=True, stretch=True)},
        "images": {"images": some_images(pair, torch.arange(rows)[-some:], size, groups=2)},
        "residuals": {"residuals": some_maps(residual_places(denoiser), rows, size)},
        "features": {"features": some_maps(feature_places(denoiser), rows, size)},
    }
    changes["everything"] = {
        name: value
        for each in ("mask", "dora", "images", "residuals", "features")
        for name, value in changes[each].items()
    }
    return StepInputs(torch.randn(rows, tokens, pair.kv_width), **sized, **changes[kind])


KINDS = ("bare", "mask", "small", "wide", "images", "residuals", "features", "dora", "everything")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind_equals_torch(sd1: Pair, kind: str) -> None:
    torch.manual_seed(3)
    for rows, size in ((1, (8, 8)), (3, (9, 6)), (6, (8, 12))):
        inputs = step_inputs(sd1, rows, size, kind)
        assert difference(sd1, inputs, size) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"),
    [("small", "fp32", TOLERANCE), ("everything", "fp32", TOLERANCE), ("small", "fp16", HALF_TOLERANCE)],
)
def test_a_step_of_the_demo_base_equals_torch(graph_cache: Path, kind: str, precision: str, tolerance: float) -> None:
    torch.manual_seed(11)
    pair = make_pair(DEMO_BASE, "sd1", graph_cache, precision)
    for rows, size in ((1, (16, 16)), (3, (12, 20))):
        assert difference(pair, step_inputs(pair, rows, size, kind), size) <= tolerance


def check_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() / expected.abs().max().clamp(min=1) <= TOLERANCE


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("make", [make_net, make_union])
def test_a_controlnet_equals_torch(
    sd1: Pair, tmp_path: Path, graph_cache: Path, family: str, make: Callable[..., NetModel]
) -> None:
    torch.manual_seed(12)
    base = sd1.folder if family == "sd1" else make_tiny_sdxl(tmp_path / "base")
    pair = sd1 if family == "sd1" else make_pair(base, "sdxl", graph_cache)
    version: Any = None
    kinds, pictures = ((1, 3), 2) if make is make_union else ((), 1)
    ours, theirs = (each.load_net(version, lambda: make(load_unet(base), 5)) for each in (pair.onnx, pair.torch))
    assert ours.of(kinds) is ours.of(kinds)
    mine, reference = ours.of(kinds), theirs.of(kinds)
    assert mine.kv_width == reference.kv_width
    for rows, (height, width) in ((1, (8, 8)), (3, (9, 6))):
        states = torch.randn(rows, 80, load_unet(base).config.cross_attention_dim)
        controls, strengths = torch.rand(pictures, 3, 8 * height, 8 * width), [0.7] * pictures
        kv, hint = mine.project(states), mine.embed(controls, strengths)
        check_near(kv, reference.project(states))
        check_near(hint, reference.embed(controls, strengths))
        pooled, sizes = torch.randn(rows, 40), torch.full((rows, 6), 1024.0)
        added = mine.condition(pooled, sizes)
        assert (added is None) == (reference.condition(pooled, sizes) is None) == (family == "sd1")
        sample, timestep = torch.randn(rows, 4, height, width), torch.randint(0, 999, (rows,)).float()
        mask = torch.arange(80) < torch.randint(1, 80, (rows, 1))
        for there in (None, mask):
            inputs = sample, timestep, NetInputs(kv, hint.expand(rows, -1, -1, -1), added, there)
            for found, expected in zip(mine.residuals(*inputs), reference.residuals(*inputs), strict=True):
                check_near(found, expected)


def test_a_batch_is_stacked_once_and_anew_when_it_changes(sd1: Pair) -> None:
    torch.manual_seed(4)
    one, other = (step_inputs(sd1, 2, (8, 8), "small") for _ in range(2))
    for inputs in (one, one, other, one):
        assert difference(sd1, inputs, (8, 8)) <= TOLERANCE


@pytest.mark.parametrize("skip", [0, 1])
def test_text_equals_torch(sd1: Pair, skip: int) -> None:
    torch.manual_seed(5)
    tokens = torch.randint(0, 500, (3, 77))
    mask = torch.ones(3, 77, dtype=torch.int64)
    mask[0, 60:] = 0
    overrides = Overrides(torch.randn(2, 32), torch.tensor([0, 2]), torch.tensor([4, 9]))
    layout = sd1.torch.text_layouts[0]
    for carried in (None, factors(layout, 3, 8, sets=3)):
        inputs = TextInputs(tokens, carried, overrides, skip, mask)
        expected, found = sd1.torch.encode(0, inputs), sd1.onnx.encode(0, inputs)
        assert (found.states - expected.states).abs().max() <= TOLERANCE


def test_keys_and_values_equal_torch(sd1: Pair) -> None:
    torch.manual_seed(6)
    states, of_values = torch.randn(2, 77, 32), torch.randn(2, 77, 32)
    carried = factors(sd1.torch.kv_layout, 2, 16, sets=1)
    for given in ((states, None, None), (states, carried, of_values)):
        assert (sd1.onnx.project(*given) - sd1.torch.project(*given)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("tiled", [False, True])
def test_the_vae_equals_torch(sd1: Pair, *, tiled: bool) -> None:
    torch.manual_seed(7)
    latents, pixels = torch.randn(2, 4, 12, 9), torch.rand(1, 3, 64, 48) * 2 - 1
    expected, found = (each.vae.decode(latents, tiled=tiled).int() for each in (sd1.torch, sd1.onnx))
    assert (found - expected).abs().max() <= 1
    ours, theirs = (each.vae.encode(pixels) for each in (sd1.onnx, sd1.torch))
    assert (ours.mean - theirs.mean).abs().max() <= TOLERANCE
    assert (ours.deviation - theirs.deviation).abs().max() <= TOLERANCE


def test_a_variant_shares_what_it_does_not_change(sd1: Pair) -> None:
    torch.manual_seed(8)
    name = "conv_out.weight"
    changed = {"unet": {name: torch.randn_like(sd1.torch.graphs.states["unet"][name])}}
    both = Pair(sd1.torch.variant(changed), sd1.onnx.variant(changed), sd1.folder)
    before = sd1.onnx.weights_digest()
    inputs = step_inputs(both, 2, (8, 8), "bare")
    assert difference(both, inputs, (8, 8)) <= TOLERANCE
    assert difference(sd1, inputs, (8, 8)) <= TOLERANCE
    assert both.onnx._sessions["text_encoder"] is sd1.onnx._sessions["text_encoder"]
    assert both.onnx._sessions["unet.bare"] is not sd1.onnx._sessions["unet.bare"]
    assert sd1.onnx.weights_digest() == before == sd1.torch.weights_digest() != both.onnx.weights_digest()


def test_sdxl_reads_pooled_text_and_sizes(tmp_path: Path, graph_cache: Path) -> None:
    torch.manual_seed(9)
    pair = make_pair(make_tiny_sdxl(tmp_path / "base"), "sdxl", graph_cache)
    for size in ((8, 8), (6, 10)):
        assert difference(pair, step_inputs(pair, 3, size, "mask", tokens=154), size) <= TOLERANCE
    tokens = torch.randint(1, 500, (2, 77))
    expected, found = (each.encode(1, TextInputs(tokens)) for each in (pair.torch, pair.onnx))
    assert found.pooled is not None and expected.pooled is not None
    assert (found.pooled - expected.pooled).abs().max() <= TOLERANCE


def test_hypernetworks_in_self_attention_are_refused(sd1: Pair) -> None:
    chain = ContextInputs(torch.tensor([0]), (), torch.ones(1, 0))
    inputs = StepInputs(torch.randn(1, 77, sd1.kv_width), contexts=(chain,))
    with pytest.raises(Refused, match="executor torch"):
        sd1.onnx.denoise(torch.randn(1, 4, 8, 8), torch.tensor([1.0]), inputs)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="CUDAExecutionProvider"):
        check_available("cuda", "fp32")
    with pytest.raises(Unavailable, match="bfloat16"):
        check_available("cpu", "bf16")
    monkeypatch.setattr("scumble_server.executors.onnxruntime.sessions.ort", None)
    with pytest.raises(Unavailable, match="not installed"):
        check_available("cpu", "fp32")


def test_the_environment_names_the_executor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCUMBLE_EXECUTOR", "onnxruntime")
    assert ServerConfig(home=tmp_path, base="a/b").executor == "onnxruntime"
    monkeypatch.setenv("SCUMBLE_EXECUTOR", "tvm")
    with pytest.raises(InvalidRequest, match="torch, onnxruntime"):
        ServerConfig(home=tmp_path, base="a/b")
