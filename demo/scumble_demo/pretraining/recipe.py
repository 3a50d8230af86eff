"""The recipe: all hyperparameters of the base's training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scumble_demo.pretraining.loop import LoopConfig

VAE_LOOP = LoopConfig(steps=6000, learning_rate=1.5e-3, ema_decay=0.998, validate_every=400, save_every=400)
CLIP_LOOP = LoopConfig(
    steps=900,
    learning_rate=1e-3,
    weight_decay=0.05,
    ema_decay=0.998,
    validate_every=150,
    save_every=100,
    betas=(0.9, 0.98),
)
UNET_LOOP = LoopConfig(steps=6000, learning_rate=1e-3, warmup=300, final_ratio=0.01, validate_every=700, save_every=100)


SCORER_LOOP = LoopConfig(
    steps=1500, learning_rate=3e-3, weight_decay=0.05, ema_decay=0.997, validate_every=150, save_every=200
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps and learning rates of the stages, batch sizes, seeds and widths of the models."""

    vae: LoopConfig = VAE_LOOP
    clip: LoopConfig = CLIP_LOOP
    unet: LoopConfig = UNET_LOOP
    scorer: LoopConfig = SCORER_LOOP
    vae_batch: int = 16
    clip_batch: int = 96
    unet_batch: int = 32
    scorer_batch: int = 96
    seed: int = 1
    vae_channels: tuple[int, ...] = (32, 64, 64, 64)
    unet_channels: tuple[int, ...] = (64, 128, 128)
    unet_heads: tuple[int, ...] = (2, 4, 4)
    concept_share: int = 8  # frequency of a concept's picture in the VAE's data, relative to other emoji

    def with_steps(self, **steps: int | None) -> Recipe:
        """Return the recipe with other numbers of steps for the named stages; None leaves a stage as it is."""
        changes = {
            stage: replace(getattr(self, stage), steps=count) for stage, count in steps.items() if count is not None
        }
        return replace(self, **changes)
