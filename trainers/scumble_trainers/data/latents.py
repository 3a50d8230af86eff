"""Pictures as latents, encoded once and cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scumble.files import whole_file
from scumble_trainers.data.buckets import Size
from scumble_trainers.data.dataset import Example, load_picture

Autoencoder: TypeAlias = Any
"""An AutoencoderKL. diffusers sets its `config` at run time, unseen by type checkers."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number done and the total."""


@dataclass(frozen=True, slots=True)
class Latents:
    """The autoencoder's posterior of N pictures, times its scaling factor, fp32 on the CPU."""

    mean: tuple[Tensor, ...]  # N of (C, h, w)
    std: tuple[Tensor, ...]  # N of (C, h, w)

    def __len__(self) -> int:
        return len(self.mean)

    def shape(self, picture: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture's latents."""
        channels, height, width = self.mean[picture].shape
        return channels, height, width

    def means(self, pictures: Tensor) -> Tensor:
        """Return the posterior means `(B, C, h, w)` of pictures of one size."""
        return torch.stack([self.mean[picture] for picture in pictures.tolist()])

    def sample(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Draw `(B, C, h, w)` from each chosen picture's posterior, with standard normal `noise`."""
        return self.means(pictures) + torch.stack([self.std[picture] for picture in pictures.tolist()]) * noise

    def by_size(self, pictures: Tensor) -> list[Tensor]:
        """Group `pictures` by size, each group in the given order."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for picture in pictures.tolist():
            groups.setdefault(self.shape(picture), []).append(picture)
        return [torch.tensor(groups[shape]) for shape in sorted(groups)]


def pixels(picture: Image.Image) -> Tensor:
    """Convert a picture to `(3, H, W)` in [-1, 1]."""
    array = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@torch.no_grad()
def encode_pictures(
    vae: Autoencoder,
    examples: Sequence[Example],
    sizes: Sequence[Size],
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> Latents:
    """Encode all examples, each at its size."""
    means: dict[int, Tensor] = {}
    stds: dict[int, Tensor] = {}
    for share in _shares(sizes, batch):
        pictures = [load_picture(examples[index].path, sizes[index]) for index in share]
        stacked = torch.stack([pixels(picture) for picture in pictures])
        posterior = vae.encode(stacked.to(vae.device, vae.dtype)).latent_dist
        means.update(zip(share, _scaled(posterior.mean, vae), strict=True))
        stds.update(zip(share, _scaled(posterior.std, vae), strict=True))
        if progress is not None:
            progress(len(means), len(examples))
    order = range(len(examples))
    return Latents(tuple(means[index] for index in order), tuple(stds[index] for index in order))


def _shares(sizes: Sequence[Size], batch: int) -> Iterator[list[int]]:
    """Yield indices of at most `batch` pictures of one size."""
    for size in sorted(set(sizes)):
        those = [index for index, own in enumerate(sizes) if own == size]
        yield from (those[start : start + batch] for start in range(0, len(those), batch))


def _scaled(values: Tensor, vae: Autoencoder) -> tuple[Tensor, ...]:
    scaled = values.float().cpu() * float(vae.config.scaling_factor)
    return scaled.contiguous().unbind(0)


def cached_latents(
    folder: Path,
    vae: Autoencoder,
    examples: Sequence[Example],
    sizes: Sequence[Size],
    *,
    progress: Progress | None = None,
) -> Latents:
    """Encode pictures, or read them from the cache in `folder` for the same autoencoder and pictures."""
    key = _cache_key(vae, examples, sizes)
    file = folder / "latents.safetensors"
    cached = _read_cache(file, key, len(examples))
    if cached is not None:
        return cached
    latents = encode_pictures(vae, examples, sizes, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"mean.{index}": value.clone() for index, value in enumerate(latents.mean)}
    tensors |= {f"std.{index}": value.clone() for index, value in enumerate(latents.std)}
    with whole_file(file) as partial:
        save_file(tensors, partial, metadata={"key": key})
    return latents


def _cache_key(vae: Autoencoder, examples: Sequence[Example], sizes: Sequence[Size]) -> str:
    digest = hashlib.sha256()
    for example, size in zip(examples, sizes, strict=True):
        digest.update(f"{example.digest} {size}".encode())
    for name, weight in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read_cache(file: Path, key: str, count: int) -> Latents | None:
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as content:
        if (content.metadata() or {}).get("key") != key:
            return None
        mean, std = (tuple(content.get_tensor(f"{name}.{i}") for i in range(count)) for name in ("mean", "std"))
    return Latents(mean, std)
