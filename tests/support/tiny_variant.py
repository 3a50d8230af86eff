"""Checkpoints of the tiny base, as if it had been fine-tuned."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def make_checkpoint(
    base: Path, folder: Path, *, seed: int = 0, components: Sequence[str] = ("unet",), strength: float = 0.3
) -> Path:
    """The base's folder in which every third matrix and convolution of `components` is another."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    for component in components:
        (file,) = (folder / component).glob("*.safetensors")
        tensors = load_file(file)
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        matrices = [name for name in sorted(tensors) if tensors[name].ndim > 1 and "embedding" not in name]
        for name in matrices[seed % 3 :: 3]:
            values = tensors[name]
            noise = torch.randn(values.shape, generator=generator)
            tensors[name] = (values + strength * values.float().std() * noise).to(values.dtype)
        file.unlink()
        save_file(tensors, file, metadata)
    return folder
