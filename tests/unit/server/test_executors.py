"""The ONNX Runtime executor equals the torch executor: graphs, batches, sizes, ranks, every kind of input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scumble_build.adapted import Factors
from scumble_build.export.denoiser import feature_places, residual_places
from scumble_build.families import FAMILIES
from scumble_build.inputs import ImageInputs, StepInputs, level_sizes
from scumble_build.layout import Layout
from scumble_server.executors.onnxruntime import OnnxRuntimeExecutor
from scumble_server.executors.torch import TorchExecutor

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """Two executors of one base."""

    torch: TorchExecutor
    onnx: OnnxRuntimeExecutor
    folder: Path

    @property
    def kv_width(self) -> int:
        return sum(2 * place.width for place in self.torch.kv_slices)


@pytest.fixture(scope="session")
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


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


def some_factors(
    layout: Layout, rows: int, rank: int, *, slots: int, full: bool = False, stretch: bool = False
) -> Factors:
    extent = layout.full if full else layout.small
    total_in, total_out = extent.total_in, extent.total_out
    return Factors(
        0.2 * torch.randn(slots, total_in, rank),
        0.2 * torch.randn(slots, total_out, rank),
        torch.arange(rows) % slots,
        torch.rand(rows, rank),
        0,
        0.3 * torch.randn(rows, total_out) if stretch else None,
        0.3 * torch.randn(rows, total_in) if stretch else None,
    )


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
        "small": {"factors": some_factors(layout, some, 8, slots=2)},
        "wide": {"factors": some_factors(layout, rows, 64, slots=min(rows, 3))},
        "full": {"factors": some_factors(layout, some, 16, slots=2, full=True)},
        "dora": {"factors": some_factors(layout, some, 8, slots=1, full=True, stretch=True)},
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


KINDS = ("bare", "mask", "small", "wide", "full", "dora", "images", "residuals", "features", "everything")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind_equals_torch(sd1: Pair, kind: str) -> None:
    torch.manual_seed(3)
    for rows, size in ((1, (8, 8)), (3, (9, 6)), (6, (8, 12))):
        inputs = step_inputs(sd1, rows, size, kind)
        assert difference(sd1, inputs, size) <= TOLERANCE
