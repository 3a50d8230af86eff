"""Arrays of a file, as the registry reads them → tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scumble_registry.formats.safetensors_header import Array


def as_tensor(values: Array) -> Tensor:
    """A float32 copy: torch knows no bfloat16 of numpy's, and may not write to what is mapped from a file."""
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
