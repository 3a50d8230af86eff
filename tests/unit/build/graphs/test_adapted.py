"""Layers with factors as an input: equal to PEFT's own layer, whatever the order and number of slots."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from scumble.errors import Refused
from scumble_build.graphs import adapted
from scumble_build.graphs.adapted import (
    Adapted,
    FactorInput,
    Factors,
    convolve_by_set,
    convolve_grouped,
    layout_of,
)
from scumble_build.graphs.denoiser import Denoiser, KVProjection
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.layout import RANK_BUCKETS, Extent, Layout, TargetShape, rank_bucket
from support.paging import columns, some_factors


@dataclass(frozen=True)
class Layer:
    """A layer between two others in the layout, so that its offsets are not zero."""

    adapted: Adapted
    layout: Layout

    @classmethod
    def of(cls, base: nn.Linear | nn.Conv2d, *, small: bool = True) -> Layer:
        it = TargetShape("it", base.weight[0].numel(), base.weight.shape[0], small)
        layout = Layout.of([TargetShape("before", 3, 5), it, TargetShape("after", 2, 2, small)])
        return cls(Adapted(base, layout.targets["it"], FactorInput()), layout)

    def columns(self, factors: Factors, row: int) -> tuple[Tensor, Tensor]:
        """down, and up with the scale in it."""
        down, up = columns(factors, self.layout, self.adapted.target, row)
        return down, up * factors.scale[row][:, None]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_row_equals_pefts_layer(convolution: bool, small: bool) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 10, 1) if convolution else nn.Linear(6, 10)
    layer, kind = Layer.of(base, small=small), PeftConv2d if convolution else PeftLinear
    carried = some_factors(layer.layout, [0], 16, full=not small, rows_per_set=1)
    oracle = kind(copy.deepcopy(base), "one", LoraConfig(r=16, lora_alpha=24), r=16, lora_alpha=24)
    down, up = layer.columns(carried, 0)
    oracle.lora_A["one"].weight.data = down.reshape(oracle.lora_A["one"].weight.shape).clone()
    oracle.lora_B["one"].weight.data = (up.T / 1.5).reshape(oracle.lora_B["one"].weight.shape).clone()
    x = torch.randn(1, 6, 4, 4) if convolution else torch.randn(1, 16, 6)
    layer.adapted.source.factors = carried
    with torch.no_grad():
        assert torch.allclose(layer.adapted(x), oracle(x), atol=1e-4)
        assert not torch.allclose(layer.adapted(x), base(x), atol=1e-1)


@pytest.mark.parametrize("convolution", [False, True])
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    bare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_every_row_is_as_alone(convolution: bool, counts: list[int], bare: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = Layer.of(nn.Conv2d(6, 10, 1) if convolution else nn.Linear(6, 10))
    sets = [index for index, count in enumerate(counts) for _ in range(count)]
    regular = counts[0] if len(set(counts)) == 1 else 0
    carried = some_factors(layer.layout, sets, 8, rows_per_set=regular)
    rows = len(sets) + bare
    x = torch.randn(rows, 6, 2, 3) if convolution else torch.randn(rows, 5, 6)
    with torch.no_grad():
        layer.adapted.source.factors = carried
        together = layer.adapted(x)
        for row in range(rows):
            pages = replace(carried.small, table=carried.small.table[row : row + 1])
            one = Factors(pages, None, carried.scale[row : row + 1])
            layer.adapted.source.factors = one if row < len(sets) else None
            assert torch.allclose(layer.adapted(x[row : row + 1]), together[row : row + 1], atol=1e-4)


def test_a_layer_of_the_rest_is_bare_where_a_batch_brings_the_small_layout_only() -> None:
    layer, x = Layer.of(nn.Linear(6, 10), small=False), torch.randn(1, 4, 6)
    layer.adapted.source.factors = some_factors(layer.layout, [0], 8)
    assert torch.equal(layer.adapted(x), layer.adapted.base(x))


def test_the_denoiser_without_factors_is_the_unet(tiny_base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet", local_files_only=True)
    sample, states = torch.randn(3, 4, 8, 8), torch.randn(3, 77, 32)
    timestep = torch.tensor([1.0, 500.0, 999.0])
    with torch.no_grad():
        expected = unet(sample, timestep, states).sample
        projection = KVProjection(unet)
        ours = Denoiser(unet, projection.slices)(sample, timestep, StepInputs(projection(states)))
    assert torch.allclose(ours, expected, atol=1e-5)


def test_the_layouts_share_no_target_and_cover_every_layer(tiny_base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet", local_files_only=True)
    layers = {"unet." + name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    projection = KVProjection(unet)
    layout = Denoiser(unet, projection.slices).layout
    step, kv = set(layout.targets), set(projection.layout.targets)
    assert not step & kv
    assert step | kv == layers
    small = {name for name, target in layout.targets.items() if target.in_end <= layout.small.total_in}
    assert small | kv == {name for name in layers if ".attentions." in name}


def test_the_small_layout_comes_before_the_rest() -> None:
    layout = Layout.of([TargetShape("deep", 33, 3, small=False), TargetShape("a", 2, 4), TargetShape("b", 5, 40)])
    assert layout.small == Extent(64, 96)
    assert layout.full == Extent(128, 128)
    assert layout.rest == Extent(64, 32)
    assert layout.extent(["a", "b", "elsewhere"]) == layout.small
    assert layout.extent(["a", "deep"]) == layout.full


def test_layouts_are_the_same_if_their_targets_are() -> None:
    one, same = (Layout.of([TargetShape("a", 2, 4), TargetShape("b", 5, 40)]) for _ in range(2))
    assert one.digest == same.digest
    assert one.digest != Layout.of([TargetShape("a", 2, 4), TargetShape("b", 6, 40)]).digest


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sets", [(0, 1), (0, 0, 1, 1), (0, 0)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(3, 1, 1, (6, 5)), (3, 2, 1, (6, 5)), (3, 2, 1, (4, 8)), (3, 2, 0, (7, 6)), (1, 1, 0, (3, 4)), (1, 2, 0, (3, 4))],
)
def test_a_convolution_of_any_stride_equals_pefts(
    kernel: int,
    stride: int,
    padding: int,
    size: tuple[int, int],
    sets: tuple[int, ...],
    grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    if grouped:  # as on a GPU
        monkeypatch.setattr(adapted, "convolve_by_set", convolve_grouped)
    base = nn.Conv2d(6, 10, kernel, stride=stride, padding=padding)
    layer, rows = Layer.of(base), len(sets)
    carried = some_factors(layer.layout, sets, 8, rows_per_set=rows // len(set(sets)))
    x = torch.randn(rows + 1, 6, *size)
    layer.adapted.source.factors = carried
    with torch.no_grad():
        ours = layer.adapted(x)
        assert torch.allclose(ours[rows:], base(x[rows:]), atol=1e-6)
        for row in range(rows):
            oracle = PeftConv2d(copy.deepcopy(base), "one", LoraConfig(r=8, lora_alpha=8), r=8, lora_alpha=8)
            down, up = layer.columns(carried, row)
            taps = down.reshape(8, kernel, kernel, 6).permute(0, 3, 1, 2)
            oracle.lora_A["one"].weight.data = taps.contiguous()
            oracle.lora_B["one"].weight.data = up.T[:, :, None, None].clone()
            assert torch.allclose(ours[row : row + 1], oracle(x[row : row + 1]), atol=1e-4)


class _Noted(TorchDispatchMode):
    """Notes the operators that run, and the largest tensor that one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("convolve", [convolve_by_set, convolve_grouped])
def test_a_convolutions_taps_are_never_maps(convolve: Callable[[Tensor, Tensor, nn.Conv2d], Tensor]) -> None:
    base, noted = nn.Conv2d(16, 16, 3, padding=1), _Noted()
    x, A = torch.randn(2, 16, 32, 32), torch.randn(2, 16, 9 * 16)
    with torch.inference_mode(), noted:
        convolve(x, A, base)
    assert noted.largest <= x.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows_per_set", [0, 1, 2, 4])
def test_the_base_product_adds_itself_onto_the_factors_part(bias: bool, rows_per_set: int) -> None:
    torch.manual_seed(0)
    base, noted = nn.Linear(6, 10, bias=bias), _Noted()
    layer, group = Layer.of(base), rows_per_set or 1
    sets = [row // group for row in range(4)]
    carried = some_factors(layer.layout, sets, 16, rows_per_set=rows_per_set)
    x = torch.randn(4, 5, 6)
    layer.adapted.source.factors = carried
    with torch.inference_mode(), noted:
        ours = layer.adapted(x)
    # A bias would have to be written before, which is a pass more.
    assert noted.names[-1] == ("aten::baddbmm_" if bias else "aten::addmm_")
    for row in range(4):
        oracle = PeftLinear(copy.deepcopy(base), "one", LoraConfig(r=16, lora_alpha=16), r=16, lora_alpha=16)
        down, up = layer.columns(carried, row)
        oracle.lora_A["one"].weight.data, oracle.lora_B["one"].weight.data = down.clone(), up.T.clone()
        with torch.no_grad():
            assert torch.allclose(ours[row], oracle(x[row]), atol=1e-4)


def test_targets_begin_where_a_graph_can_gather_them() -> None:
    layout = layout_of({"a": nn.Linear(3, 5), "b": nn.Conv2d(2, 7, 1), "c": nn.Linear(40, 4)})
    ends_in = [(each.in_offset, each.in_end) for each in layout.targets.values()]
    ends_out = [(each.out_offset, each.out_end) for each in layout.targets.values()]
    assert ends_in == [(0, 3), (32, 34), (64, 104)]
    assert ends_out == [(0, 5), (32, 39), (64, 68)]
    assert (layout.full.total_in, layout.full.total_out) == (128, 96)


def test_rank_buckets() -> None:
    assert [rank_bucket(rank) for rank in (1, 8, 9, 64, 65, 256)] == [8, 8, 16, 64, 128, 256]
    with pytest.raises(Refused, match=r"257 rank columns.*256"):
        rank_bucket(RANK_BUCKETS[-1] + 1)
