"""Layers with factors as an input: equal to PEFT's own layer, whatever the order and number of slots."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from scumble.errors import Refused
from scumble_build.adapted import Adapted, FactorInput, Factors, layout_of
from scumble_build.denoiser import Denoiser, KVProjection
from scumble_build.inputs import StepInputs
from scumble_build.layout import RANK_BUCKETS, Extent, Layout, Shape, rank_bucket


def adapted(base: nn.Linear | nn.Conv2d) -> Adapted:
    """The layer between two others in the layout, so that its offsets are not zero."""
    layout = Layout.of(
        [Shape("before", 3, 5), Shape("it", base.weight[0].numel(), base.weight.shape[0]), Shape("after", 2, 2)]
    )
    return Adapted(base, layout.targets["it"], FactorInput())


def factors(slot: list[int], rank: int, rows_per_slot: int, layer: Adapted) -> Factors:
    slots = max(slot) + 1
    target = layer.target
    return Factors(
        torch.randn(slots, target.in_offset + target.fan_in + 2, rank),
        torch.randn(slots, target.out_offset + target.fan_out + 2, rank),
        torch.tensor(slot),
        torch.randn(len(slot), rank),
        rows_per_slot,
    )


@pytest.mark.parametrize("convolution", [False, True])
def test_a_row_equals_pefts_layer(convolution: bool) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 10, 1) if convolution else nn.Linear(6, 10)
    layer, kind = adapted(base), PeftConv2d if convolution else PeftLinear
    carried = factors([0], 4, 1, layer)
    oracle = kind(copy.deepcopy(base), "one", LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
    target = layer.target
    down = carried.A[0, target.in_offset : target.in_offset + 6].T
    up = carried.B[0, target.out_offset : target.out_offset + 10] * carried.scale[0]
    oracle.lora_A["one"].weight.data = down.reshape(oracle.lora_A["one"].weight.shape).clone()
    oracle.lora_B["one"].weight.data = (up / 1.5).reshape(oracle.lora_B["one"].weight.shape).clone()
    x = torch.randn(1, 6, 4, 4) if convolution else torch.randn(1, 16, 6)
    layer.source.factors = carried
    with torch.no_grad():
        assert torch.allclose(layer(x), oracle(x), atol=1e-5)
        assert not torch.allclose(layer(x), base(x), atol=1e-1)


@pytest.mark.parametrize("convolution", [False, True])
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    bare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_every_row_is_as_alone(convolution: bool, counts: list[int], bare: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = adapted(nn.Conv2d(6, 10, 1) if convolution else nn.Linear(6, 10))
    slot = [index for index, count in enumerate(counts) for _ in range(count)]
    regular = counts[0] if len(set(counts)) == 1 else 0
    carried = factors(slot, 4, regular, layer)
    rows = len(slot) + bare
    x = torch.randn(rows, 6, 2, 3) if convolution else torch.randn(rows, 5, 6)
    with torch.no_grad():
        layer.source.factors = carried
        together = layer(x)
        for row in range(rows):
            one = Factors(carried.A, carried.B, carried.slot[row : row + 1], carried.scale[row : row + 1])
            layer.source.factors = one if row < len(slot) else None
            assert torch.allclose(layer(x[row : row + 1]), together[row : row + 1], atol=1e-4)


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


def test_the_small_layout_is_a_prefix_of_the_full_one() -> None:
    layout = Layout.of([Shape("deep", 9, 3, small=False), Shape("a", 2, 4), Shape("b", 5, 6)])
    assert layout.small == Extent(7, 10)
    assert layout.full == Extent(16, 13)
    assert layout.extent(["a", "b", "elsewhere"]) == layout.small
    assert layout.extent(["a", "deep"]) == layout.full


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, (6, 5)), (3, 2, (6, 5)), (3, 2, (4, 8)), (1, 1, (3, 4))])
def test_a_convolution_of_any_stride_equals_pefts(kernel: int, stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 10, kernel, stride=stride, padding=kernel // 2)
    layer = adapted(base)
    carried = factors([0, 1], 4, 1, layer)
    x = torch.randn(3, 6, *size)
    layer.source.factors = carried
    with torch.no_grad():
        ours = layer(x)
        assert torch.allclose(ours[2:], base(x[2:]), atol=1e-6)
        for row in (0, 1):
            oracle = PeftConv2d(copy.deepcopy(base), "one", LoraConfig(r=4, lora_alpha=4), r=4, lora_alpha=4)
            target = layer.target
            down = carried.A[row, target.in_offset : target.in_end].T.reshape(4, kernel, kernel, 6).permute(0, 3, 1, 2)
            oracle.lora_A["one"].weight.data = down.contiguous()
            up = carried.B[row, target.out_offset : target.out_end] * carried.scale[row]
            oracle.lora_B["one"].weight.data = up[:, :, None, None].clone()
            assert torch.allclose(ours[row : row + 1], oracle(x[row : row + 1]), atol=1e-4)


def test_offsets_leave_no_gap_and_no_overlap() -> None:
    layout = layout_of({"a": nn.Linear(3, 5), "b": nn.Conv2d(2, 7, 1), "c": nn.Linear(4, 4)})
    ends_in = [(each.in_offset, each.in_offset + each.fan_in) for each in layout.targets.values()]
    ends_out = [(each.out_offset, each.out_offset + each.fan_out) for each in layout.targets.values()]
    assert ends_in == [(0, 3), (3, 5), (5, 9)]
    assert ends_out == [(0, 5), (5, 12), (12, 16)]
    assert (layout.full.total_in, layout.full.total_out) == (9, 16)


def test_rank_buckets() -> None:
    assert [rank_bucket(rank) for rank in (1, 8, 9, 64, 65, 256)] == [8, 8, 16, 64, 128, 256]
    with pytest.raises(Refused, match=r"257 rank columns.*256"):
        rank_bucket(RANK_BUCKETS[-1] + 1)
