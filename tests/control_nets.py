"""Tiny random nets of the ControlNet family for the tiny base, in diffusers' own classes and layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from torch import nn

UNION_TYPES = 6
_OF_UNET = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "down_block_types",
)


def load_unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True).eval()


def randomise(model: nn.Module, seed: int, strength: float = 0.3) -> None:
    """Zero convolutions would show nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "controlnet_" in name or "spatial_ch_projs" in name or not parameter.any():
                nn.init.normal_(parameter, std=strength)


def make_net(unet: UNet2DConditionModel, seed: int, **config: object) -> ControlNetModel:
    """The embedding of the picture halves it three times, as latents are."""
    channels = config.pop("conditioning_embedding_out_channels", (8, 8, 16, 16))
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    net.register_to_config(**config)
    randomise(net, seed)
    return net.eval()


def make_union(unet: UNet2DConditionModel, seed: int) -> ControlNetUnionModel:
    torch.manual_seed(seed)
    net = ControlNetUnionModel(
        **{key: unet.config[key] for key in _OF_UNET},
        conditioning_embedding_out_channels=(8, 8, 16, 16),
        addition_time_embed_dim=8,
        num_control_type=UNION_TYPES,
        num_trans_channel=unet.config.block_out_channels[0],
        num_trans_head=4,
        num_proj_channel=unet.config.block_out_channels[0],
    )
    net.down_blocks.load_state_dict(unet.down_blocks.state_dict())
    randomise(net, seed)
    return net.eval()


def make_t2i(channels: tuple[int, ...], seed: int, kind: str = "full_adapter", in_channels: int = 3) -> T2IAdapter:
    torch.manual_seed(seed)
    return T2IAdapter(
        in_channels=in_channels, channels=list(channels), num_res_blocks=1, downscale_factor=8, adapter_type=kind
    ).eval()
