"""A VAE in eager PyTorch: decodes latents in the UNet's scale (mean 0, deviation 1) to pixels and encodes pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scumble.errors import Refused
from scumble_server.executors.device import faults
from scumble_server.executors.protocol import LatentDistribution
from scumble_server.executors.tiles import decode_tiles


class TorchVae:
    """Runs a VAE, which is on its device and in its precision already."""

    def __init__(self, model: AutoencoderKL, least: int = 1) -> None:
        """`least`: the side of the smallest latents that it decodes."""
        self._model: Any = model
        self.least = least

    def move(self, device: torch.device) -> None:
        self._model.to(device)

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        latents = latents.to(self._model.device)
        mean, deviation = self._scale(latents)
        latents = (latents * deviation + mean).to(self._model.dtype)
        with faults(f"decoding {len(latents)} pictures"):
            decoded = decode_tiles(self._decode, latents, self._tile) if tiled else self._decode(latents)
        if not decoded.isfinite().all():  # it would be drawn black
            dtype = str(self._model.dtype).removeprefix("torch.")
            raise Refused(
                f"the VAE made NaN or infinite pixels in {dtype}: name one in options.vae that bears it (for SDXL one "
                "that is safe in half precision), or serve with --precision fp32"
            )
        pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return pixels.round().to(torch.uint8).cpu()

    @property
    def _tile(self) -> int:
        """The side of the latents that it was trained at, as in diffusers."""
        return max(int(self._model.tile_latent_min_size), self.least)

    def _decode(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self._model.decode(latents, return_dict=False)[0]
        return decoded.float()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> LatentDistribution:
        with faults("encoding a picture"):
            posterior = self._model.encode(pixels.to(self._model.device, self._model.dtype), return_dict=False)[0]
        mean, deviation = self._scale(posterior.mean.float())
        return LatentDistribution(
            ((posterior.mean.float() - mean) / deviation)[0], (posterior.std.float() / deviation)[0]
        )

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of latents in the VAE's own scale, `(1, 1|C, 1, 1)`."""
        config = self._model.config
        mean, deviation = like.new_zeros(1, 1, 1, 1), like.new_ones(1, 1, 1, 1) / config.scaling_factor
        if config.latents_mean is not None and config.latents_std is not None:
            mean = like.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            deviation = deviation * like.new_tensor(config.latents_std).view(1, -1, 1, 1)
        return mean, deviation
