"""The training loop: steps are functions of (seed, step); every checkpoint has a validation loss and a sample grid."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from scumble.errors import Refused
from scumble_trainers.draws import Draw, draw_step, pictures_of_step
from scumble_trainers.losses import validation_loss
from scumble_trainers.method import TrainingMethod
from scumble_trainers.progress import ProgressReport
from scumble_trainers.results.provenance import Cost, device_name, peak_memory
from scumble_trainers.results.sampling import add_column
from scumble_trainers.settings import TrainSettings
from scumble_trainers.steps.checkpoints import Checkpoint, restore_optimizer, restore_parameters, write_checkpoint

LEVELS = 8  # noise levels of the validation loss
MOST_MEASURED = 64  # training pictures for the training loss beside it


@dataclass(slots=True)
class Run:
    """A run in progress. Owns its folder `out` and the method's parameters; used from one thread."""

    accelerator: Accelerator
    method: TrainingMethod[Any]
    out: Path
    identity: dict[str, Any]
    """Configuration, data and base, which must be equal when a run is resumed."""
    report: ProgressReport
    step: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of the base (`before`) and the latest ones (`after`)."""
    cost: Cost = field(init=False)
    average: EMAModel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.cost = Cost(0.0, 0, device_name(self.accelerator.device))

    @property
    def settings(self) -> TrainSettings:
        settings: TrainSettings = self.method.settings
        return settings

    def train(self, checkpoint: Checkpoint | None = None) -> None:
        """Run to the last step, from `checkpoint` if there is one."""
        parameters = self.method.trained()
        if self.settings.gradient_checkpointing:
            self.method.enable_gradient_checkpointing()
        model, optimizer = self.accelerator.prepare(self.method, self._optimizer(parameters))
        if self.settings.ema is not None:
            self.average = EMAModel(parameters.values(), decay=self.settings.ema, use_ema_warmup=True)
        if checkpoint is not None:
            self._restore(checkpoint, parameters, optimizer)
        started = time.monotonic()
        spent = self.cost
        if checkpoint is None:
            self._measure_base()
        while self.step < self.settings.steps:
            loss = self._train_step(model, optimizer, parameters)
            self.step += 1
            self.accelerator.log({"loss": loss}, step=self.step)
            self.report("training", self.step, self.settings.steps, f"loss {loss:.4f}")
            if self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps:
                with self.averaged():
                    self._measure()
                now = Cost(time.monotonic() - started, peak_memory(self.accelerator.device), self.cost.device)
                self.cost = spent.and_then(now)
                self._write(parameters, optimizer)
                self.accelerator.wait_for_everyone()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters are their moving average, if there is one."""
        if self.average is None:
            yield
            return
        parameters = list(self.method.trained().values())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def _train_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
    ) -> float:
        """Do one update over the whole batch; returns the mean loss of this process's share."""
        factor = learning_rate_factor(self.settings, self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        accelerator, parts = self.accelerator, self.settings.accumulate
        share = self._draw().part(accelerator.process_index, accelerator.num_processes)
        total = 0.0
        for index in range(parts):
            with accelerator.accumulate(model):
                loss = model(share.part(index, parts))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters.values(), self.settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item() / parts
        if self.average is not None:
            self.average.step(parameters.values())
        if not math.isfinite(total):
            raise Refused(
                f"the loss of step {self.step + 1} is not finite: use a lower --learning-rate, or "
                "--mixed-precision bf16 in place of fp16; the last checkpoint is intact"
            )
        return total

    def _draw(self) -> Draw:
        material, settings = self.method.material, self.settings
        groups = material.latents.by_size(material.trained)
        pictures = pictures_of_step(settings.seed, self.step, settings.batch_size, groups)
        return draw_step(
            settings.seed,
            self.step,
            pictures=pictures,
            latent_shape=material.latents.shape(int(pictures[0])),
            train_timesteps=int(material.schedule.config.num_train_timesteps),
            caption_dropout=settings.caption_dropout,
        )

    def _optimizer(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        """Make AdamW with one group per learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(self.method.learning_rate(name), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": those, "initial_lr": rate, "lr": rate} for rate, those in groups.items()],
            weight_decay=self.settings.weight_decay,
        )

    def _measure_base(self) -> None:
        """Measure losses and draw samples of the base."""
        with self.method.as_base():
            self.metrics["before"] = self._losses()
            self._sample()

    def _measure(self) -> None:
        self.metrics["after"] = self._losses()
        self.accelerator.log(self.metrics["after"], step=self.step)
        self._sample()

    @torch.no_grad()
    def _losses(self) -> dict[str, float]:
        """Return the losses on held-out and training pictures with fixed noise and first captions, at the current
        weights.
        """
        material = self.method.material
        groups = {"validation_loss": material.held, "training_loss": material.trained[:MOST_MEASURED]}
        return {name: self._loss_of(pictures) for name, pictures in groups.items() if len(pictures)}

    def _loss_of(self, pictures: Tensor) -> float:
        material = self.method.material
        with self.accelerator.autocast():
            return validation_loss(
                material.schedule,
                self.method.predict_measured,
                material.latents,
                pictures,
                device=self.accelerator.device,
                seed=self.settings.seed,
                levels=LEVELS,
            )

    def _sample(self) -> None:
        """Add this step's column and redraw the grid."""
        if not self.accelerator.is_main_process:
            return
        self.report("samples", self.step, self.settings.steps)
        samples = self.method.material.samples
        with self.accelerator.autocast():
            pictures = self.method.draw(samples)
        sheet = add_column(self.out, self.step, pictures, samples.prompts)
        for tracker in self.accelerator.trackers:
            tracker.log_images({"samples": np.asarray(sheet)[None]}, step=self.step, dataformats="NHWC")

    def _write(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler, average = self.accelerator.scaler, self.average
        write_checkpoint(
            self.out / "checkpoints",
            self.step,
            parameters,
            {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
                "average": average.state_dict() if average else {},
            },
            {
                "identity": self.identity,
                "metrics": self.metrics,
                "seconds": self.cost.seconds,
                "peak_memory": self.cost.peak_memory,
            },
            extras=self.save_adapter,
            keep=self.settings.keep_checkpoints,
        )

    def save_adapter(self, folder: Path) -> None:
        """Save the adapter (its moving average, if there is one), as users get it."""
        with self.averaged():
            self.method.save(folder, self.settings.save_dtype)

    def _restore(
        self, checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        restore_parameters(checkpoint, parameters)
        content = restore_optimizer(checkpoint)
        optimizer.load_state_dict(content["optimizer"])
        if self.accelerator.scaler and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
            self.average.to(self.accelerator.device)
        self.step = checkpoint.step
        self.metrics = checkpoint.state["metrics"]
        self.cost = Cost(checkpoint.state["seconds"], checkpoint.state["peak_memory"], self.cost.device)


def learning_rate_factor(settings: TrainSettings, step: int) -> float:
    """Return the learning rate's factor in (0, 1]: linear warm-up, then constant, or a cosine that ends near 0."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
