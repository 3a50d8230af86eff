"""Random ControlNet-LLLites in kohya's layout, and their published formula put into diffusers' UNet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from support.single_files import to_unet

KERNELS = ((4, 2), (4, 4), (4, 4, 2))
"""Of the convolutions over the picture, by how deep in the UNet the matrix stands."""
EMBEDDED, INNER = 8, 4


class Lite(nn.Module):
    def __init__(self, width: int, level: int) -> None:
        super().__init__()
        kernels = KERNELS[level]
        widths = [3, *[EMBEDDED // 2] * (len(kernels) - 1), EMBEDDED]
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Conv2d(widths[i], widths[i + 1], kernel, kernel))
        self.conditioning1 = nn.Sequential(*layers)
        self.down = nn.Sequential(nn.Linear(width, INNER), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(INNER + EMBEDDED, INNER), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(INNER, width))

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        embedding = self.conditioning1(picture).flatten(2).transpose(1, 2).expand(len(x), -1, -1)
        return self.up(self.mid(torch.cat([embedding, self.down(x)], 2)))


def make_lllite(unet: UNet2DConditionModel, seed: int) -> dict[str, Lite]:
    """By diffusers' name of the matrix: what self-attention reads, and cross-attention's queries."""
    torch.manual_seed(seed)
    levels = len(unet.config.block_out_channels)
    found = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and re.search(r"attn1\.to_[qkv]$|attn2\.to_q$", name):
            found[name] = Lite(layer.in_features, _level(name, levels)).eval().requires_grad_(False)
            for parameter in found[name].parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.7 * parameter.shape[-1] ** -0.5)
    return found


def _level(name: str, levels: int) -> int:
    match = re.match(r"(down|up)_blocks\.(\d+)", name)
    if match is None:
        return levels - 1
    return int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])


def save_lllite(lites: dict[str, Lite], unet: UNet2DConditionModel, file: Path) -> Path:
    """Under the modules' original names."""
    state = unet.state_dict()
    theirs = dict(zip(state, to_unet(state), strict=True))
    tensors = {}
    for name, lite in lites.items():
        module = theirs[f"{name}.weight"].removesuffix(".weight").replace(".", "_")
        tensors |= {f"lllite_unet_{module}.{part}": values for part, values in lite.state_dict().items()}
    save_file(tensors, file)
    return file


def apply_lllite(lites: dict[str, Lite], unet: UNet2DConditionModel, picture: Tensor, weight: float) -> None:
    """picture `(1, 3, H, W)` in 0…1."""

    def hook(lite: Lite) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, read: (read[0] + weight * lite(read[0], 2 * picture - 1), *read[1:])

    for name, lite in lites.items():
        unet.get_submodule(name).register_forward_pre_hook(hook(lite))
