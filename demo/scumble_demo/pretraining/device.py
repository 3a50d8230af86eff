"""Chooses device and precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from scumble_demo.pretraining import workers


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """Use bfloat16 products with float32 weights: 1.5× faster on CPUs with AVX512-BF16, more on GPUs."""
    return torch.autocast(device.type, torch.bfloat16)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return a step's CPU generator, a function of seed, step and the worker's rank only."""
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + step + workers.rank() * 7_000_000_007)
