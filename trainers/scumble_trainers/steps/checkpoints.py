"""Checkpoints, from which a killed run continues: trained parameters, optimiser state and step, written atomically.

OUT/checkpoints/step-000250/
    trained.safetensors     parameters by name, fp32
    optimizer.pt            tensors and numbers only; read with weights_only
        state.json              step, and the run's other state
        …                       files of the method (the adapter at this step, ready to use)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scumble.errors import IntegrityError
from scumble.files import replace_folder


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    step: int
    state: dict[str, Any]


def write_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    extras: Callable[[Path], None] | None = None,
    keep: int = 2,
) -> Checkpoint:
    """Write a checkpoint under a temporary name, rename it, then delete all but the newest `keep`.

    `extras` may add files. A crash leaves the older checkpoints intact; an error also leaves no temporary files.
    """
    final = folder / f"step-{step:06d}"
    with replace_folder(final, durable=True) as partial:
        tensors = {name: parameter.detach().float().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(tensors, partial / "trained.safetensors")
        torch.save(dict(optimizer), partial / "optimizer.pt")
        if extras is not None:
            extras(partial)
        (partial / "state.json").write_text(json.dumps({**state, "step": step}, indent=2), "utf-8")
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(final, step, {**state, "step": step})


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest complete checkpoint of a run, if there is one."""
    folders = _folders(folder)
    if not folders:
        return None
    newest = folders[-1]
    try:
        state = json.loads((newest / "state.json").read_text("utf-8"))
        return Checkpoint(newest, int(state["step"]), state)
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{newest} is damaged ({error}): delete it to continue from the one before") from error


@torch.no_grad()
def restore_parameters(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the stored values into `parameters`. Raises IntegrityError for other names or shapes."""
    stored: dict[str, Tensor] = load_file(checkpoint.folder / "trained.safetensors")
    if stored.keys() != parameters.keys():
        odd = sorted(stored.keys() ^ parameters.keys())[:3]
        raise IntegrityError(f"{checkpoint.folder} holds other parameters than this run trains, such as {odd}")
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def restore_optimizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the `optimizer` that was passed to `write_checkpoint`."""
    content = torch.load(checkpoint.folder / "optimizer.pt", map_location="cpu", weights_only=True)
    assert isinstance(content, dict)
    return content


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
