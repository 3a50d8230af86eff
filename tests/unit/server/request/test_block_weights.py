"""Block weights: the webui's lists of every usual length, and names; anything else is said to be wrong."""

from __future__ import annotations

import pytest

from scumble.errors import InvalidRequest
from scumble_build.graphs.blocks import UNetBlocks
from scumble_server.request.block_weights import block_weights


def targets(attention_down: range, attention_up: range, levels: int) -> list[str]:
    """One layer of every block of a UNet with two resnets a level."""
    names = ["text_encoder.text_model.encoder.layers.0.mlp.fc1", "unet.conv_in", "unet.mid_block.attentions.0.proj_in"]
    for level in range(levels):
        names += [f"unet.down_blocks.{level}.resnets.{i}.conv1" for i in range(2)]
        names += [f"unet.up_blocks.{level}.resnets.{i}.conv1" for i in range(3)]
    names += [f"unet.down_blocks.{level}.attentions.{i}.proj_in" for level in attention_down for i in range(2)]
    names += [f"unet.up_blocks.{level}.attentions.{i}.proj_in" for level in attention_up for i in range(3)]
    return names


SD15 = (UNetBlocks(4, 2), targets(range(3), range(1, 4), 4))
SDXL = (UNetBlocks(3, 2), targets(range(1, 3), range(2), 3))


@pytest.mark.parametrize(
    ("family", "length", "second", "last_attention"),
    [
        (SD15, 17, "IN01", "OUT11"),
        (SD15, 26, "IN00", "OUT11"),
        (SDXL, 12, "IN04", "OUT05"),
        (SDXL, 20, "IN00", "OUT08"),
    ],
)
def test_the_usual_lists(family: tuple[UNetBlocks, list[str]], length: int, second: str, last_attention: str) -> None:
    blocks, names = family
    weights = block_weights([float(i) for i in range(length)], blocks, names)
    assert weights is not None
    labels = [label for label, _ in weights.labels]
    assert (labels[0], labels[1], labels[-1]) == ("BASE", second, last_attention)
    assert weights.of("text_encoder.text_model.encoder.layers.0.mlp.fc1") == 0.0
    assert weights.of("unet.mid_block.attentions.0.proj_in") == labels.index("M00")


def test_a_list_of_another_length_says_which_are_taken() -> None:
    with pytest.raises(InvalidRequest, match=r"13 block weights.*26.*17"):
        block_weights([1.0] * 13, *SD15)


def test_names_and_paths_the_longest_wins() -> None:
    weights = block_weights({"IN01": 0.1, "down_blocks.0": 0.2, "down_blocks.0.attentions.1": 0.3, "M00": 0.4}, *SD15)
    assert weights is not None
    assert weights.of("unet.down_blocks.0.resnets.0.conv1") == 0.2, "a path goes before a label"
    assert weights.of("unet.down_blocks.0.attentions.1.proj_in") == 0.3
    assert weights.of("unet.mid_block.attentions.0.proj_in") == 0.4
    assert weights.of("unet.up_blocks.1.attentions.0.proj_in") == 1.0


@pytest.mark.parametrize("name", ["IN12", "down_blocks.7", "down_block", "unet.mid"])
def test_an_unknown_block_is_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        block_weights({name: 1.0}, *SD15)


def test_no_block_weights_are_none() -> None:
    assert block_weights(None, *SD15) is None
