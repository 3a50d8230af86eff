"""Models that are not whole, published as they could be before a model was compared with its config."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from scumble_registry.formats import structure


@contextmanager
def unchecked() -> Iterator[None]:
    """Publish whatever comes."""
    with patch.object(structure, "compare_shapes", lambda *_: structure.Mismatch()):
        yield


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Write a file of weights again after `change` altered the tensors by name."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file


def without(folder: Path, copy: Path, file: str, tensor: str) -> Path:
    """Copy a folder, with one tensor fewer in one of its files."""
    shutil.copytree(folder, copy)
    edit_tensors(copy / file, lambda tensors: tensors.pop(tensor))
    return copy
