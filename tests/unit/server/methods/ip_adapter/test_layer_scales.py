"""Scales by layer are diffusers' own `set_ip_adapter_scale`; what it overlooks is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from scumble.errors import InvalidRequest
from scumble_server.methods.ip_adapter.layer_scales import layer_scales
from support.tiny_ip import make_ip_adapter


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    file = make_ip_adapter(tiny_base, tmp_path_factory.mktemp("ip") / "a.safetensors", "base")
    loaded = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    loaded.load_ip_adapter(file.parent, subfolder="", weight_name=file.name, image_encoder_folder=None)
    return loaded


def attentions(pipeline: StableDiffusionPipeline) -> list[str]:
    names = pipeline.unet.attn_processors
    return [f"unet.{name.removesuffix('.processor')}" for name in names if "attn2" in name]


@pytest.mark.parametrize(
    "scale",
    [
        0.6,
        {},
        {"up": 0.5},
        {"mid": 0.25},
        {"mid": [0.25]},
        {"down": {"block_0": 2}, "mid": 1, "up": {"block_1": [0.0, 1.0]}},
        {"up": {"block_1": [0.7]}},
        {"up": [0.1, 0.2]},
        {"down": {"block_0": [[1.0, 0.5]]}, "up": {"block_1": [[1.0, 0.5], [0.2, 0.1]]}},
        {"up": {"block_1": [[1.0, 0.5]]}, "mid": 0.3},
        [0.4, 0.2],
    ],
)
def test_equal_to_diffusers(pipeline: StableDiffusionPipeline, scale: Any) -> None:
    pipeline.set_ip_adapter_scale([scale] if isinstance(scale, list) else scale)
    for index, ours in enumerate(layer_scales(scale, attentions(pipeline), 2, masked=True)):
        theirs = {}
        for name in ours:
            value = pipeline.unet.attn_processors[f"{name.removeprefix('unet.')}.processor"].scale[0]
            theirs[name] = value[index] if isinstance(value, list) else value
        assert ours == theirs


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ({"left": 1}, "no left with cross-attention; it has {down, up, mid}"),
        ({"up": {"block_0": 1}}, r"no up.block_0 with cross-attention; it has up.{block_1}"),
        ({"up": {"block_1": [1, 2, 3]}}, "up.block_1 has 2 transformers, but 3 scales"),
        ({"mid": [1, 2]}, "mid has 1 transformers, but 2 scales"),
        ({"mid": "loud"}, "mid is 'loud'"),
        ({"up": {"block_1": [[1, 2, 3], 0]}}, "3 scales for 2 masked pictures"),
        ([1.0, 2.0, 3.0], "3 scales for 2 masked pictures"),
        ([], "a number is needed"),
    ],
)
def test_what_means_nothing_is_refused(pipeline: StableDiffusionPipeline, scale: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        layer_scales(scale, attentions(pipeline), 2, masked=True)
    assert caught.value.fields["field"] == "adapters.scale"


def test_a_scale_for_each_picture_needs_masks(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(InvalidRequest, match="needs a mask for each"):
        layer_scales([1.0, 2.0], attentions(pipeline), 2, masked=False)
