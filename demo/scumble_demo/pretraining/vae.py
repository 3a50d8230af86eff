"""Stage 1: the autoencoder, 128×128 pixels ↔ 16×16×4 latents, trained mostly on 64-pixel crops.

Crops take a quarter of the time. Every fourth step, and all steps of the last quarter of the run, use whole pictures,
so that the normalisation layers see their statistics.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from scumble_demo.emoji.render import contact_sheet
from scumble_demo.pretraining.device import mixed_precision, step_generator

KL_WEIGHT = (
    3e-4  # KL weight per latent element; gives latents a spread of a few percent, which the decoder learns to handle
)
CHANNELS = (32, 64, 64, 64)


def new_vae(channels: tuple[int, ...] = CHANNELS, sample_size: int = 128) -> AutoencoderKL:
    """Make a small version of SD 1.5's autoencoder: four levels, so the latents' side is an eighth of the picture's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sample_size,
    )


def to_model(pictures: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """Convert bytes `(n, H, W, 3)` to floats `(n, 3, H, W)` in -1…1."""
    values = torch.as_tensor(np.ascontiguousarray(pictures) if isinstance(pictures, np.ndarray) else pictures)
    scaled = values.to(device).float().div_(127.5).sub_(1)
    return scaled.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def to_bytes(values: Tensor) -> NDArray[np.uint8]:
    """Convert floats back to bytes, the inverse of `to_model`, with clipping."""
    scaled = values.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    result: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return result


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Return the L1 loss on pixels, edges, colour (differences between channels) and local means."""
    edges = sum((made.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean() for axis in (2, 3))
    colours = sum(
        (functional.avg_pool2d(made, size) - functional.avg_pool2d(wanted, size)).abs().mean() for size in (8, 32)
    )
    chroma = ((made - made.roll(1, dims=1)) - (wanted - wanted.roll(1, dims=1))).abs().mean()
    return (made - wanted).abs().mean() + 0.5 * edges + 0.5 * colours + 0.5 * chroma


class VaeStage:
    """Trains on `pictures (n, H, W, 3)`; `held_out` are for validation."""

    name = "vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        pictures: NDArray[np.uint8],
        held_out: NDArray[np.uint8],
        *,
        seed: int,
        steps: int,
        device: torch.device,
        batch: int = 16,
    ) -> None:
        self.module = vae.to(device, memory_format=torch.channels_last)
        self.pictures, self.held_out = pictures, held_out
        self.seed, self.steps, self.device, self.batch = seed, steps, device, batch

    def loss(self, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        wanted = self._batch(step, generator)
        with mixed_precision(self.device):
            posterior = self.module.encode(wanted).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
            latents = posterior.mean.float() + posterior.std.float() * noise
            made = self.module.decode(latents).sample.float()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        total: Tensor = reconstruction_loss(made, wanted) + KL_WEIGHT * divergence
        return total

    def validate(self) -> dict[str, float]:
        wanted = to_model(self.held_out, self.device)
        made = self._reconstruct(wanted)
        error = (made - wanted).abs().mean(dim=(1, 2, 3)) * 127.5
        return {"val_levels": float(error.mean()), "val_levels_worst": float(error.max())}

    def sample(self, path: Path) -> None:
        made = to_bytes(self._reconstruct(to_model(self.held_out, self.device)))
        both = np.stack([self.held_out, made], axis=1).reshape(-1, *made.shape[1:])
        contact_sheet(both, columns=10).save(path)

    def _reconstruct(self, wanted: Tensor) -> Tensor:
        parts = [self.module.decode(self.module.encode(p).latent_dist.mean).sample for p in wanted.split(16)]
        return torch.cat(parts)

    def _batch(self, step: int, generator: torch.Generator) -> Tensor:
        """Return crops or whole pictures, some mirrored, some with permuted or grey colours."""
        whole = step % 4 == 0 or step >= self.steps * 3 // 4
        count = max(1, self.batch // 4) if whole else self.batch
        side = self.pictures.shape[1]
        size = side if whole else side // 2
        chosen = torch.randint(len(self.pictures), (count,), generator=generator).tolist()
        corners = torch.randint(side - size + 1, (count, 2), generator=generator).tolist()
        kinds = torch.rand((count, 3), generator=generator).tolist()
        crops = []
        for index, (top, left), (mirror, colour, order) in zip(chosen, corners, kinds, strict=True):
            crop = self.pictures[index, top : top + size, left : left + size]
            crop = crop[:, ::-1] if mirror < 0.5 else crop
            if colour < 0.1:
                crop = np.roll(crop, 1 if order < 0.5 else 2, axis=2)
            elif colour < 0.15:
                crop = np.repeat(np.asarray(Image.fromarray(np.ascontiguousarray(crop)).convert("L"))[..., None], 3, 2)
            crops.append(crop)
        return to_model(np.stack(crops), self.device)


def latent_statistics(vae: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> float:
    """Return the factor that scales the latents of these pictures to unit variance (SD's `scaling_factor`)."""
    with torch.no_grad():
        means = [
            vae.encode(to_model(part, device)).latent_dist.mean
            for part in np.array_split(pictures, len(pictures) // 16 + 1)
        ]
    return float(1 / torch.cat(means).std())
