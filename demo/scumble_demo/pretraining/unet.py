"""Stage 3: trains the UNet on cached latents, with captions from the frozen text encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from scumble_demo.pretraining.device import mixed_precision, step_generator
from scumble_demo.pretraining.scheduler import new_scheduler
from scumble_trainers.data.latents import Latents
from scumble_trainers.losses import denoising_loss, noise_schedule, validation_loss

CHANNELS = (64, 128, 128)
HEADS = (2, 4, 4)
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


def new_unet(
    channels: tuple[int, ...] = CHANNELS,
    heads: tuple[int, ...] = HEADS,
    sample_size: int = 16,
    cross_attention_dim: int = 128,
) -> UNet2DConditionModel:
    """Make a small version of SD 1.5's UNet: three levels, cross-attention on all but the lowest."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=heads,  # the number of heads, by diffusers' old name
        norm_num_groups=16,
    )


@dataclass(frozen=True, slots=True)
class UnetCache:
    """The UNet's training data, computed once.

    `latents (n, 4, h, w)`, scaled; `texts (n, variants, T, D)`, hidden states of each picture's captions;
    `wordings (n, T, D)`, of a held-out caption for validation; `empty (T, D)`, of the empty prompt.
    """

    latents: Tensor
    texts: Tensor
    wordings: Tensor
    empty: Tensor

    def as_latents(self) -> Latents:
        """Encode pictures to the means of their posteriors."""
        return Latents(self.latents.unbind(0), torch.zeros_like(self.latents).unbind(0))


class UnetStage:
    """Trains on all pictures of the cache; a tenth of the captions are empty, for classifier-free guidance."""

    name = "unet"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        cache: UnetCache,
        *,
        seed: int,
        device: torch.device,
        draw: Callable[[Path], None],
        batch: int = 32,
    ) -> None:
        self.module = unet.to(device, memory_format=torch.channels_last)
        self.cache, self.seed, self.device, self.batch, self.draw = cache, seed, device, batch, draw
        self.schedule = noise_schedule(dict(new_scheduler().config))

    def loss(self, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        n, variants = self.cache.texts.shape[:2]
        chosen = torch.randint(n, (self.batch,), generator=generator)
        variant = torch.randint(variants, (self.batch,), generator=generator)
        timesteps = torch.randint(1000, (self.batch,), generator=generator)
        noise = torch.randn((self.batch, *self.cache.latents.shape[1:]), generator=generator)
        dropped = torch.rand((self.batch, 1, 1), generator=generator) < CAPTION_DROPOUT
        texts = torch.where(dropped, self.cache.empty, self.cache.texts[chosen, variant].float())
        losses = denoising_loss(
            self.schedule,
            partial(self._trained, texts.to(self.device)),
            self.cache.latents[chosen].to(self.device),
            noise.to(self.device),
            timesteps.to(self.device),
            min_snr_gamma=MIN_SNR_GAMMA,
        )
        return losses.mean()

    def validate(self) -> dict[str, float]:
        """Measure the loss with fixed noise and held-out captions."""
        pictures = torch.arange(0, len(self.cache.latents), max(1, len(self.cache.latents) // 96))
        loss = validation_loss(
            self.schedule, self._plain, self.cache.as_latents(), pictures, device=self.device, seed=self.seed
        )
        return {"val_loss": loss}

    def sample(self, path: Path) -> None:
        self.draw(path)

    def _trained(self, texts: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        with mixed_precision(self.device):
            predicted: Tensor = self.module(noisy, timesteps, texts).sample
        return predicted

    def _plain(self, pictures: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        texts = self.cache.wordings[pictures].to(self.device)
        predicted: Tensor = self.module(noisy, timesteps, texts).sample
        return predicted
