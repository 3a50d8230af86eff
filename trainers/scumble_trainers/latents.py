"""Pictures as latents, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scumble_trainers.dataset import Example, load_picture

Autoencoder: TypeAlias = Any
"""An AutoencoderKL. diffusers sets its `config` at run time, where no type checker looks."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Latents:
    """The autoencoder's posterior of N pictures, already multiplied by its scaling factor, fp32 on the CPU."""

    mean: Tensor  # (N, C, h, w)
    std: Tensor  # (N, C, h, w)

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one picture."""
        _, channels, height, width = self.mean.shape
        return channels, height, width

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """`(B, C, h, w)`: one draw from each chosen picture's posterior, by standard normal `noise`."""
        return self.mean[indices] + self.std[indices] * noise

    def select(self, indices: Sequence[int]) -> Latents:
        return Latents(self.mean[list(indices)], self.std[list(indices)])


def pixels(picture: Image.Image) -> Tensor:
    """`(3, H, W)` in [-1, 1]."""
    array = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@torch.no_grad()
def encode_pictures(
    vae: Autoencoder,
    examples: Sequence[Example],
    *,
    resolution: int,
    batch: int = 8,
    progress: Progress | None = None,
) -> Latents:
    """Runs the encoder over all examples, in order; reports how many are done."""
    means: list[Tensor] = []
    stds: list[Tensor] = []
    for start in range(0, len(examples), batch):
        pictures = [load_picture(example.path, resolution) for example in examples[start : start + batch]]
        stacked = torch.stack([pixels(picture) for picture in pictures])
        posterior = vae.encode(stacked.to(vae.device, vae.dtype)).latent_dist
        means.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
        stds.append(posterior.std.float().cpu() * vae.config.scaling_factor)
        if progress is not None:
            progress(min(start + batch, len(examples)), len(examples))
    return Latents(torch.cat(means).contiguous(), torch.cat(stds).contiguous())


def cached_latents(
    folder: Path,
    vae: Autoencoder,
    examples: Sequence[Example],
    *,
    resolution: int,
    progress: Progress | None = None,
) -> Latents:
    """`encode_pictures`, or what an earlier run kept in `folder` for the same autoencoder and pictures."""
    key = _cache_key(vae, examples, resolution)
    file = folder / "latents.safetensors"
    kept = _read_cache(file, key)
    if kept is not None:
        return kept
    latents = encode_pictures(vae, examples, resolution=resolution, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"mean": latents.mean, "std": latents.std}, partial, metadata={"key": key})
    partial.replace(file)
    return latents


def _cache_key(vae: Autoencoder, examples: Sequence[Example], resolution: int) -> str:
    digest = hashlib.sha256(str(resolution).encode())
    for example in examples:
        digest.update(example.digest.encode())
    for name, weight in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_cache(file: Path, key: str) -> Latents | None:
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as content:
        if (content.metadata() or {}).get("key") != key:
            return None
        return Latents(content.get_tensor("mean"), content.get_tensor("std"))
