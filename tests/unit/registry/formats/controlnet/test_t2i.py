"""T2I-Adapters in the original layout; diffusers builds them."""

from __future__ import annotations

import pytest
import torch
from diffusers import T2IAdapter

from scumble_registry.formats.controlnet import t2i
from support import control_nets


@pytest.mark.parametrize(
    ("kind", "channels"),
    [
        ("full_adapter", (320, 640, 1280, 1280)),
        ("light_adapter", (320, 640, 1280)),
        ("full_adapter_xl", (320, 640, 1280, 1280)),
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_the_config_of_a_real_t2i_adapter_is_told_from_its_shapes(
    kind: str, channels: tuple[int, ...], grey: bool
) -> None:
    fold, resnets = (16 if kind.endswith("xl") else 8), (4 if kind.startswith("light") else 2)
    with torch.device("meta"):
        real = T2IAdapter(1 if grey else 3, list(channels), resnets, fold, kind)
    shapes = {name: tuple(values.shape) for name, values in real.state_dict().items()}
    original = {control_nets.to_t2i(name, resnets, kind): shape for name, shape in shapes.items()}
    renamed = t2i.rename(original)
    assert {new: original[old] for old, new in renamed.items()} == shapes
    told = t2i.config(shapes)
    asked = {"in_channels", "channels", "num_res_blocks", "downscale_factor", "adapter_type"}
    assert {key: told[key] for key in asked} == {key: real.config[key] for key in asked}
