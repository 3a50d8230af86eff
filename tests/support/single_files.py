"""Tiny checkpoints as single files in the original layout, written down apart from the importer.

From a folder in the diffusers layout: the UNet's and VAE's names back to what the original code calls them, a text
encoder of OpenCLIP with query, key and value in one matrix.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_single_file(
    folder: Path, file: Path, *, lightning: bool = False, ema: bool = False, parts: str = "uvt"
) -> Path:
    """Of SD 1.x, 2.x or XL, whichever the folder is. `.ckpt` is written with torch.save, as Lightning does."""
    tensors = single_file(folder, parts)
    if ema:
        generator = torch.Generator().manual_seed(1)
        unet = [name for name in tensors if name.startswith("model.diffusion_model.")]
        tensors |= {
            f"model_ema.{name[len('model.') :].replace('.', '')}": tensors[name]
            + 0.1 * torch.randn(tensors[name].shape, generator=generator)
            for name in unet
        }
        tensors["model_ema.decay"], tensors["model_ema.num_updates"] = torch.tensor(0.9), torch.tensor(3)
    file.parent.mkdir(parents=True, exist_ok=True)
    if lightning:
        extra = {"epoch": 1, "global_step": 10, "pytorch-lightning_version": "1.4.2", "callbacks": {}}
        torch.save({"state_dict": tensors, "optimizer_states": [], "lr_schedulers": [], **extra}, file)
    else:
        save_file({name: values.contiguous() for name, values in tensors.items()}, file)
    return file


def single_file(folder: Path, parts: str = "uvt") -> Tensors:
    found: Tensors = {"alphas_cumprod": torch.linspace(0.99, 0.01, 10), "betas": torch.linspace(0.01, 0.02, 10)}
    if "u" in parts:
        found |= {f"model.diffusion_model.{name}": v for name, v in to_unet(load(folder / "unet")).items()}
    if "v" in parts:
        found |= {f"first_stage_model.{name}": v for name, v in to_vae(load(folder / "vae")).items()}
    text = load(folder / "text_encoder")
    if "t" not in parts:
        return found
    if (folder / "text_encoder_2").is_dir():
        second = to_open_clip(load(folder / "text_encoder_2"))
        found |= {f"conditioner.embedders.0.transformer.{name}": v for name, v in to_clip(text).items()}
        found |= {f"conditioner.embedders.1.model.{name}": v for name, v in second.items()}
    elif text_width(text) == 1024:
        found |= {f"cond_stage_model.model.{name}": v for name, v in to_open_clip(text, more_layers=1).items()}
    else:
        found |= {f"cond_stage_model.transformer.{name}": v for name, v in to_clip(text).items()}
    return found


def load(component: Path) -> Tensors:
    (file,) = component.glob("*.safetensors")
    return load_file(file)


def text_width(text: Tensors) -> int:
    return next(v.shape[1] for name, v in text.items() if name.endswith("token_embedding.weight"))


def to_clip(text: Tensors) -> Tensors:
    found = {f"text_model.{name.removeprefix('text_model.')}": values for name, values in text.items()}
    return found | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def to_open_clip(text: Tensors, more_layers: int = 0) -> Tensors:
    plain = {name.removeprefix("text_model."): values for name, values in text.items()}
    found = {
        "positional_embedding": plain.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": plain.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": plain.pop("final_layer_norm.weight"),
        "ln_final.bias": plain.pop("final_layer_norm.bias"),
        "logit_scale": torch.tensor(4.6),
    }
    width = found["positional_embedding"].shape[1]
    projection = plain.pop("text_projection.weight", torch.eye(width))
    found["text_projection"] = projection.T
    layers = 1 + max(int(name.split(".")[2]) for name in plain)
    for layer in range(layers):
        found |= _block(f"transformer.resblocks.{layer}.", plain, f"encoder.layers.{layer}.")
    for layer in range(layers, layers + more_layers):  # what SD 2.x's files have and nobody reads
        last = f"transformer.resblocks.{layers - 1}."
        found |= {
            name.replace(last, f"transformer.resblocks.{layer}."): torch.randn_like(values)
            for name, values in list(found.items())
            if name.startswith(last)
        }
    return found


def _block(prefix: str, plain: Tensors, ours: str) -> Tensors:
    found: Tensors = {}
    for role in ("weight", "bias"):
        joined = torch.cat([plain[f"{ours}self_attn.{part}_proj.{role}"] for part in "qkv"])
        found[f"{prefix}attn.in_proj_{role}"] = joined
        for theirs, name in {
            "attn.out_proj": "self_attn.out_proj",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }.items():
            found[f"{prefix}{theirs}.{role}"] = plain[f"{ours}{name}.{role}"]
    return found


def to_unet(tensors: Tensors) -> Tensors:
    layers = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name)))
    return {_unet_name(name, layers, tensors): values for name, values in tensors.items()}


def _unet_name(name: str, layers: int, tensors: Tensors) -> str:
    module, _, role = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{role}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_RESNET.get(match[3], match[3])}.{role}"
    side, level, kind, index, *rest = module.split(".")
    inner = ".".join(rest)
    if side == "down_blocks":
        first = 1 + int(level) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{role}"
        block = f"input_blocks.{first + int(index)}"
    else:
        first = int(level) * (layers + 1)
        if kind == "upsamplers":
            attends = any(other.startswith(f"up_blocks.{level}.attentions") for other in tensors)
            return f"output_blocks.{first + layers}.{2 if attends else 1}.conv.{role}"
        block = f"output_blocks.{first + int(index)}"
    return f"{block}.0.{_RESNET[inner]}.{role}" if kind == "resnets" else f"{block}.1.{inner}.{role}"


def to_vae(tensors: Tensors) -> Tensors:
    levels = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.down_blocks\.(\d+)", name)))
    found: Tensors = {}
    for name, values in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        if "attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = re.sub(r"to_(q|k|v)\.", r"\1.", new).replace("to_out.0", "proj_out")
            values = values[:, :, None, None] if values.ndim == 2 else values  # noqa: PLW2901 - a 1x1 convolution
        found[new] = values
    return found
