"""A stage's checkpoint: weights, EMA weights, optimiser state and step, in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from scumble.files import whole_file


def save_checkpoint(
    path: Path, step: int, module: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Replace `path` atomically: if the process is killed, the old or the new checkpoint is complete."""
    state = {"step": step, "module": module.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
    with whole_file(path, durable=True) as partial:
        torch.save(state, partial)


def load_checkpoint(
    path: Path, module: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> int:
    """Load module, EMA and optimiser in place; returns the step to continue from, 0 without a file."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    with torch.no_grad():
        for name, value in ema.items():
            value.copy_(state["ema"][name])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def read_mean(path: Path) -> dict[str, Tensor] | None:
    """Read the EMA weights of a checkpoint; None without a file."""
    if not path.is_file():
        return None
    mean: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    return mean
