"""Block names are those of the original UNet; the table is the one that block-weight tools document."""

from __future__ import annotations

import pytest

from scumble_build.graphs.blocks import UNetBlocks, blocks_of

SD15 = UNetBlocks(levels=4, layers=2)
SDXL = UNetBlocks(levels=3, layers=2)


@pytest.mark.parametrize(
    ("target", "label"),
    [
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "BASE"),
        ("unet.conv_in", "IN00"),
        ("unet.time_embedding.linear_1", "IN00"),
        ("unet.down_blocks.0.resnets.0.conv1", "IN01"),
        ("unet.down_blocks.0.attentions.1.proj_in", "IN02"),
        ("unet.down_blocks.0.downsamplers.0.conv", "IN03"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "IN04"),
        ("unet.down_blocks.2.attentions.1.proj_out", "IN08"),
        ("unet.down_blocks.3.resnets.1.conv2", "IN11"),
        ("unet.mid_block.attentions.0.proj_in", "M00"),
        ("unet.up_blocks.0.resnets.0.conv1", "OUT00"),
        ("unet.up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("unet.up_blocks.1.attentions.0.proj_in", "OUT03"),
        ("unet.up_blocks.3.attentions.2.proj_in", "OUT11"),
        ("unet.conv_out", "OUT11"),
    ],
)
def test_sd15_labels(target: str, label: str) -> None:
    assert SD15.label(target) == label


def test_sdxl_counts_nine_blocks_a_side() -> None:
    assert SDXL.count == 9
    assert SDXL.label("unet.down_blocks.1.attentions.0.proj_in") == "IN04"
    assert SDXL.label("unet.up_blocks.1.attentions.2.proj_in") == "OUT05"


def test_the_structure_is_read_from_the_targets() -> None:
    targets = [f"unet.down_blocks.{level}.resnets.{i}.conv1" for level in range(4) for i in range(2)]
    assert blocks_of([*targets, "unet.down_blocks.0.attentions.0.proj_in", "unet.conv_in"]) == SD15
