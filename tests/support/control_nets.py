"""Tiny random nets of the ControlNet family for the tiny base, in diffusers' own classes and layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

UNION_TYPES = 6
_OF_UNET = (
    "in_channels",
    "block_out_channels",
    "use_linear_projection",
    "transformer_layers_per_block",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
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


def make_union(unet: UNet2DConditionModel, seed: int, heads: int = 4) -> ControlNetUnionModel:
    torch.manual_seed(seed)
    net = ControlNetUnionModel(
        **{key: unet.config[key] for key in _OF_UNET},
        conditioning_embedding_out_channels=(8, 8, 16, 16),
        addition_time_embed_dim=unet.config.addition_time_embed_dim or 8,
        num_control_type=UNION_TYPES,
        num_trans_channel=unet.config.block_out_channels[0],
        num_trans_head=heads,
        num_proj_channel=unet.config.block_out_channels[0],
    )
    net.down_blocks.load_state_dict(unet.down_blocks.state_dict())
    randomise(net, seed)
    return net.eval()


def make_t2i(channels: tuple[int, ...], seed: int, kind: str = "full_adapter", in_channels: int = 3) -> T2IAdapter:
    torch.manual_seed(seed)
    return T2IAdapter(
        in_channels=in_channels,
        channels=list(channels),
        num_res_blocks=1,
        downscale_factor=16 if kind.endswith("xl") else 8,
        adapter_type=kind,
    ).eval()


def make_t2i_for(unet: UNet2DConditionModel, seed: int) -> T2IAdapter:
    channels = tuple(unet.config.block_out_channels)
    if "addition_embed_type" not in unet.config or unet.config.addition_embed_type is None:
        return make_t2i(channels, seed)
    return make_t2i((*channels, channels[-1]), seed, "full_adapter_xl")


def to_ldm(name: str, layers: int) -> str:
    """diffusers' name of a net's tensor → the original's, written down apart from the importer."""
    fixed = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "controlnet_mid_block.": "middle_block_out.0.",
        "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
        "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for theirs, ours in fixed.items():
        if name.startswith(theirs):
            return ours + _inside(name.removeprefix(theirs))
    parts = name.split(".")
    if parts[0] == "controlnet_down_blocks":
        return f"zero_convs.{parts[1]}.0.{parts[2]}"
    if parts[0] == "controlnet_cond_embedding":
        return f"input_hint_block.{2 * int(parts[2]) + 2}.{parts[3]}"
    level, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{parts[-1]}"
    block = f"input_blocks.{1 + level * (layers + 1) + index}"
    return f"{block}.{'0' if kind == 'resnets' else '1'}.{_inside(rest)}"


def _inside(rest: str) -> str:
    module, _, role = rest.rpartition(".")
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return f"{names.get(module, module)}.{role}" if module else role


def write_cldm(net: ControlNetModel, path: Path, base: UNet2DConditionModel | None = None) -> Path:
    """The original layout; with `base`, as differences to it."""
    layers = net.config.layers_per_block
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    if base is not None:
        own = base.state_dict()
        state = {name: value - own[name] if name in own else value for name, value in state.items()}
    tensors = {f"control_model.{to_ldm(name, layers)}": value for name, value in state.items()}
    save_file(tensors | ({"difference": torch.zeros(1)} if base is not None else {}), path)
    return path


def write_control_lora(net: ControlNetModel, path: Path, rank: int = 3) -> Path:
    """Random factors for every matrix of the encoder; norms and biases are left to the base."""
    torch.manual_seed(7)
    tensors = {"lora_controlnet": torch.zeros(0)}
    for name, value in net.state_dict().items():
        renamed = to_ldm(name, net.config.layers_per_block)
        if name.startswith("controlnet_"):
            tensors[renamed] = value.contiguous()
        elif value.ndim > 1:
            stem = renamed.removesuffix(".weight")
            tensors[f"{stem}.up"] = torch.randn(value.shape[0], rank) * 0.1
            tensors[f"{stem}.down"] = torch.randn(rank, *value.shape[1:]) * 0.1
    save_file(tensors, path)
    return path


def to_t2i(name: str, resnets: int, kind: str) -> str:
    """diffusers' name of a T2I-Adapter's tensor → the original's, written down apart from the importer."""
    parts = name.removeprefix("adapter.").split(".")
    if parts[0] != "body":
        return ".".join(parts)
    level = int(parts[1])
    if kind == "light_adapter":
        inside = ["body", *parts[3:]] if parts[2] == "resnets" else parts[2:]
        return ".".join(["body", str(level), *inside])
    place, inside = (
        (level * resnets + int(parts[3]), parts[4:]) if parts[2] == "resnets" else (level * resnets, parts[2:])
    )
    return ".".join(["body", str(place), *inside])


def write_t2i(adapter: T2IAdapter, path: Path) -> Path:
    """The original layout, as torch.save writes it."""
    resnets, kind = adapter.config.num_res_blocks, adapter.config.adapter_type
    torch.save({to_t2i(name, resnets, kind): value for name, value in adapter.state_dict().items()}, path)
    return path
