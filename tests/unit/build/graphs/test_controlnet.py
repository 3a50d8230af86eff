"""The nets with their inputs taken out, against diffusers' own calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scumble_build.graphs.controlnet import ControlNet, ControlNetUnion
from scumble_build.graphs.inputs import NetInputs
from support.control_nets import UNION_TYPES, load_unet, make_net, make_union

SIZE = (72, 48)  # levels round up
CONFIGS = {
    "plain": {},
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "pooled": {"global_pool_conditions": True},
}


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    sample = torch.randn(rows, 4, SIZE[0] // 8, SIZE[1] // 8)
    return sample, torch.linspace(900, 20, rows), torch.randn(rows, 77, 32)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_net_equals_diffusers(tiny_base: Path, name: str) -> None:
    model = make_net(load_unet(tiny_base), 1, **CONFIGS[name])
    sample, timestep, states = inputs(3)
    pictures = torch.rand(3, 3, *SIZE)
    down, middle = model(sample, timestep, states, pictures, return_dict=False)
    net = ControlNet(model)
    found = net.residuals(sample, timestep, NetInputs(net.project(states), net.embed(pictures)))
    for mine, theirs in zip(found, (*down, middle), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert theirs.abs().max() >= 1e-2
        assert mine.shape[2:] > (1, 1), "pooled residuals reach every place"


@pytest.mark.parametrize("types", [(0,), (3,), (1, 3), (5, 0, 2)])
@torch.inference_mode()
def test_a_union_net_equals_diffusers(tiny_base: Path, types: tuple[int, ...]) -> None:
    """The rows are those of one request: two images, guided. All see the same pictures."""
    model = make_union(load_unet(tiny_base), 2)
    sample, _, states = inputs(2)
    sample, states = torch.cat([sample, sample]), states.repeat_interleave(2, 0)
    timestep = torch.full((4,), 500.0)
    pictures = torch.rand(len(types), 3, *SIZE)
    weights = [1.0] if len(types) == 1 else [0.5, 1.5, -0.7][: len(types)]
    present = torch.zeros(4, UNION_TYPES)
    present[:, list(types)] = 1
    down, middle = model(
        sample,
        timestep,
        states,
        [picture.expand(4, -1, -1, -1) for picture in pictures],
        present,
        list(types),
        weights,
        return_dict=False,
    )
    net = ControlNetUnion(model)
    hint = net.fuse(pictures, types, weights).expand(4, -1, -1, -1)
    found = net.residuals_of(net.present(types), sample, timestep, NetInputs(net.project(states), hint))
    for mine, theirs in zip(found, (*down, middle), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert theirs.abs().max() >= 1e-2


@torch.inference_mode()
def test_a_row_does_not_see_its_neighbours(tiny_base: Path) -> None:
    """diffusers' union net lets the rows of a batch attend to each other; strangers must not."""
    unet = load_unet(tiny_base)
    sample, timestep, states = inputs(4)
    pictures = torch.rand(4, 3, *SIZE)
    union = ControlNetUnion(make_union(unet, 2))
    hints = torch.cat([union.fuse(picture[None], [1], [1.0]) for picture in pictures])
    plain = ControlNet(make_net(unet, 1))
    for residuals, kv, hint in (
        (plain.residuals, plain.project(states), plain.embed(pictures)),
        (lambda *rows: union.residuals_of(union.present([1]), *rows), union.project(states), hints),
    ):
        together = residuals(sample, timestep, NetInputs(kv, hint))
        for i in range(4):
            row = slice(i, i + 1)
            alone = residuals(sample[row], timestep[row], NetInputs(kv[row], hint[row]))
            for mine, all_of_them in zip(alone, together, strict=True):
                assert (mine - all_of_them[i]).abs().max() <= 1e-5 * all_of_them.abs().max()
