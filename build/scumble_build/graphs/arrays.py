"""Convert arrays, as the registry reads them from files, to tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scumble_registry.formats.safetensors_header import Array


def as_tensor(values: Array) -> Tensor:
    """Return a float32 copy: torch has no numpy bfloat16 and must not write to a memory-mapped file."""
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
