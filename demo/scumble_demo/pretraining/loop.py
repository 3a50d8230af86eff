"""The training loop of all stages: learning rate, EMA, checkpoints, validation. It can be resumed at any time.

A step's randomness depends only on (seed, step), so a resumed run does the same steps as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from scumble_demo.pretraining import workers
from scumble_demo.pretraining.checkpoint import load_checkpoint, save_checkpoint


class TrainingStage(Protocol):
    """The interface of a stage to the loop."""

    name: str

    @property
    def module(self) -> nn.Module:
        """The module with all trained weights."""

    def loss(self, step: int) -> Tensor:
        """Return the loss of one batch, a scalar that depends only on weights, seed and step."""

    def validate(self) -> dict[str, float]:
        """Measure on fixed data and noise; called with the EMA weights."""

    def sample(self, path: Path) -> None:
        """Write a sample picture; called with the EMA weights."""


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """Length and learning rate of a stage. `validate_every` and `save_every` are in steps."""

    steps: int
    learning_rate: float
    warmup: int = 100
    final_ratio: float = 0.02
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    validate_every: int = 500
    save_every: int = 250
    betas: tuple[float, float] = (0.9, 0.99)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to `final_ratio` of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    floor = config.final_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


class Ema:
    """An exponential moving average of the weights, with a shorter window at the start to forget the random weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        current = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [current[n].detach() for n in self.values], weight)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the mean weights into `module` within the block, and restore its own afterwards."""
        own = {name: value.detach().clone() for name, value in module.named_parameters()}
        copy_into(module, self.values)
        try:
            yield
        finally:
            copy_into(module, own)


@torch.no_grad()
def copy_into(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


def run_stage(stage: TrainingStage, config: LoopConfig, folder: Path) -> dict[str, float]:
    """Train `stage` to `config.steps`, from `folder/checkpoint.pt` if it exists.

    Afterwards the module has the EMA weights. Returns the last validation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        stage.module.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    ema = Ema(stage.module, config.ema_decay)
    start = load_checkpoint(folder / "checkpoint.pt", stage.module, ema.values, optimizer)
    log = _Log(stage.name, folder / "log.jsonl", start, config.steps)
    stage.module.train()
    for step in range(start, config.steps):
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = stage.loss(step)
        loss.backward()
        workers.average_gradients(stage.module)
        torch.nn.utils.clip_grad_norm_(stage.module.parameters(), config.clip_norm)
        optimizer.step()
        ema.update(stage.module, step)
        log.step(step + 1, float(loss.detach()), rate)
        if workers.rank() > 0:
            continue
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_checkpoint(folder / "checkpoint.pt", step + 1, stage.module, ema.values, optimizer)
        if (step + 1) % config.validate_every == 0 and step + 1 < config.steps:
            with ema.applied(stage.module):
                _validate(stage, folder, step + 1, log)
    copy_into(stage.module, ema.values)
    workers.wait_for_all()
    return _validate(stage, folder, config.steps, log) if workers.rank() == 0 else {}


def _validate(stage: TrainingStage, folder: Path, step: int, log: _Log) -> dict[str, float]:
    stage.module.eval()
    with torch.no_grad():
        measures = stage.validate()
        stage.sample(folder / f"sample-{step:06d}.png")
    stage.module.train()
    log.measures(step, measures)
    return measures


class _Log:
    """Writes progress as text to stderr and as JSON lines to a file."""

    def __init__(self, name: str, path: Path, start: int, steps: int) -> None:
        self.name, self.path, self.start, self.steps = name, path, start, steps
        self.begun = time.monotonic()
        self.mean_loss = 0.0

    def step(self, step: int, loss: float, rate: float, every: int = 50) -> None:
        weight = max(0.02, 1 / (step - self.start))
        self.mean_loss += weight * (loss - self.mean_loss)
        if workers.rank() > 0:
            return
        if step % every == 0 or step == self.steps:
            speed = (step - self.start) / (time.monotonic() - self.begun)
            self._write({"step": step, "loss": self.mean_loss, "lr": rate, "steps_per_s": speed})

    def measures(self, step: int, measures: dict[str, float]) -> None:
        self._write({"step": step, **measures})

    def _write(self, row: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        text = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "step")
        print(f"{self.name} {int(row['step'])}/{self.steps}  {text}", file=sys.stderr, flush=True)
