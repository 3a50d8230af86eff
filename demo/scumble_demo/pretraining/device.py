"""Where to compute and how precisely."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from scumble_demo.pretraining import workers


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 products with float32 weights: 1.5× on processors with AVX512-BF16, more on GPUs."""
    return torch.autocast(device.type, torch.bfloat16)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step, on the CPU, a function of (seed, step) and the worker's rank only."""
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + step + workers.rank() * 7_000_000_007)
