"""The loop: steps that are functions of (seed, step), and at every checkpoint a validation loss and a grid."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from scumble_trainers.captions import Captions
from scumble_trainers.checkpoints import Checkpoint, restore_optimizer, restore_parameters, write_checkpoint
from scumble_trainers.draws import Draw, draw_step
from scumble_trainers.latents import Latents
from scumble_trainers.losses import Schedule, denoising_loss, validation_loss
from scumble_trainers.methods.lora.model import factors, save_factors
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.parent import Pipeline
from scumble_trainers.progress import Report
from scumble_trainers.provenance import Cost, device_name, peak_memory
from scumble_trainers.sampling import Samples, add_column, draw_samples

LEVELS = 8  # noise levels of the validation loss
MOST_MEASURED = 64  # training pictures that its counterpart is measured on


@dataclass(frozen=True, slots=True)
class Material:
    """What a run reads: every example's latents and captions, and which of them are held out."""

    schedule: Schedule
    latents: Latents
    captions: Captions
    trained: Tensor  # (N,) int64
    held: Tensor  # (M,) int64, may be empty
    samples: Samples


@dataclass(slots=True)
class LoraRun:
    """A run in progress. Owns its folder `out` and the factors in `pipeline`; used from one thread."""

    accelerator: Accelerator
    pipeline: Pipeline
    settings: LoraSettings
    material: Material
    out: Path
    identity: dict[str, Any]
    """What a checkpoint must share with the run that resumes it: configuration, data, base."""
    report: Report
    step: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """`before` and the latest `after`."""
    cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        self.cost = Cost(0.0, 0, device_name(self.accelerator.device))

    def train(self, checkpoint: Checkpoint | None = None) -> None:
        """Runs to the last step, from `checkpoint` if there is one."""
        parameters = factors(self.pipeline)
        optimizer = self._optimizer(parameters)
        unet, text_encoder, optimizer = self._prepare(optimizer)
        if checkpoint is not None:
            self._restore(checkpoint, parameters, optimizer)
        started = time.monotonic()
        spent = self.cost
        if checkpoint is None:
            self._measure_base()
        while self.step < self.settings.steps:
            loss = self._train_step(unet, text_encoder, optimizer, parameters)
            self.step += 1
            self.accelerator.log({"loss": loss}, step=self.step)
            self.report("training", self.step, self.settings.steps, f"loss {loss:.4f}")
            if self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps:
                self._measure()
                now = Cost(time.monotonic() - started, peak_memory(self.accelerator.device), self.cost.device)
                self.cost = spent.and_then(now)
                self._write(parameters, optimizer)
                self.accelerator.wait_for_everyone()

    def _train_step(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
    ) -> float:
        """One update over the whole batch; returns its mean loss (of this process's share)."""
        factor = learning_rate_factor(self.settings, self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        accelerator, parts = self.accelerator, self.settings.accumulate
        share = self._draw().part(accelerator.process_index, accelerator.num_processes)
        total = 0.0
        for index in range(parts):
            with accelerator.accumulate(unet, text_encoder):
                loss = self._loss(unet, text_encoder, share.part(index, parts))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters.values(), self.settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item() / parts
        return total

    def _draw(self) -> Draw:
        return draw_step(
            self.settings.seed,
            self.step,
            batch=self.settings.batch_size,
            pictures=len(self.material.trained),
            latent_shape=self.material.latents.shape,
            train_timesteps=int(self.material.schedule.config.num_train_timesteps),
            caption_dropout=self.settings.caption_dropout,
        )

    def _loss(self, unet: nn.Module, text_encoder: nn.Module, draw: Draw) -> Tensor:
        """Mean loss of one part of a batch."""
        device, captions = self.accelerator.device, self.material.captions
        pictures = self.material.trained[draw.pictures]
        rows = captions.choose(pictures, draw.captions, draw.dropped)
        text = captions.embed(text_encoder, rows, device)
        losses = denoising_loss(
            self.material.schedule,
            lambda noisy, timesteps, context: unet(noisy, timesteps, context).sample,
            self.material.latents.sample(pictures, draw.posterior).to(device),
            draw.noise.to(device),
            draw.timesteps.to(device),
            text,
            min_snr_gamma=self.settings.min_snr_gamma,
        )
        return losses.mean()

    def _optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        rate = self.settings.learning_rate
        rates = {"unet": rate, "text_encoder": self.settings.text_learning_rate or rate}
        groups = [
            {
                "params": [value for name, value in parameters.items() if name.startswith(part)],
                "initial_lr": own,
            }
            for part, own in rates.items()
        ]
        filled = [group for group in groups if group["params"]]
        return torch.optim.AdamW(filled, lr=rate, weight_decay=self.settings.weight_decay)

    def _prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, nn.Module, Any]:
        """UNet, text encoder and optimiser as accelerate wraps them; a frozen text encoder stays bare."""
        if self.settings.gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        if not self.settings.text_encoder:
            unet, prepared = self.accelerator.prepare(self.pipeline.unet, optimizer)
            return unet, self.pipeline.text_encoder, prepared
        unet, text, prepared = self.accelerator.prepare(self.pipeline.unet, self.pipeline.text_encoder, optimizer)
        return unet, text, prepared

    def _measure_base(self) -> None:
        """Losses and pictures of the base: the factors still add nothing."""
        self.metrics["before"] = self._losses()
        self._sample()

    def _measure(self) -> None:
        self.metrics["after"] = self._losses()
        self.accelerator.log(self.metrics["after"], step=self.step)
        self._sample()

    @torch.no_grad()
    def _losses(self) -> dict[str, float]:
        """Held-out and training pictures at fixed noise, with their first captions, at the present weights."""
        groups = {
            "validation_loss": self.material.held,
            "training_loss": self.material.trained[:MOST_MEASURED],
        }
        return {name: self._loss_of(pictures) for name, pictures in groups.items() if len(pictures)}

    def _loss_of(self, pictures: Tensor) -> float:
        device, captions = self.accelerator.device, self.material.captions
        unet = self.pipeline.unet
        with self.accelerator.autocast():
            return validation_loss(
                self.material.schedule,
                lambda noisy, timesteps, context: unet(noisy, timesteps, context).sample,
                self.material.latents.mean[pictures].to(device),
                captions.embed(self.pipeline.text_encoder, captions.of(pictures), device),
                seed=self.settings.seed,
                levels=LEVELS,
            )

    def _sample(self) -> None:
        """Adds this moment's column and redraws the grid."""
        if not self.accelerator.is_main_process:
            return
        self.report("samples", self.step, self.settings.steps)
        with self.accelerator.autocast():
            pictures = draw_samples(self.pipeline, self.material.samples)
        sheet = add_column(self.out, self.step, pictures, self.material.samples.prompts)
        for tracker in self.accelerator.trackers:
            tracker.log_images({"samples": np.asarray(sheet)[None]}, step=self.step, dataformats="NHWC")

    def _write(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        write_checkpoint(
            self.out / "checkpoints",
            self.step,
            parameters,
            {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}},
            {
                "identity": self.identity,
                "metrics": self.metrics,
                "seconds": self.cost.seconds,
                "peak_memory": self.cost.peak_memory,
            },
            extras=self._save_adapter,
            keep=self.settings.keep_checkpoints,
        )

    def _save_adapter(self, folder: Path) -> None:
        save_factors(self.pipeline, folder, self.settings.save_dtype)

    def _restore(
        self, checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        restore_parameters(checkpoint, parameters)
        content = restore_optimizer(checkpoint)
        optimizer.load_state_dict(content["optimizer"])
        if self.accelerator.scaler and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.step = checkpoint.step
        self.metrics = checkpoint.state["metrics"]
        self.cost = Cost(checkpoint.state["seconds"], checkpoint.state["peak_memory"], self.cost.device)


def learning_rate_factor(settings: LoraSettings, step: int) -> float:
    """In (0, 1]: linear warm-up, then constant, or a cosine that would reach 0 after the last step."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
