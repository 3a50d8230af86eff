"""The weights of an adapter's file, with what is asked of all of them alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scumble.errors import Refused
from scumble_registry.formats.safetensors_header import Array, Header, read_tensors

_TYPES = ("F32", "F16", "BF16")


def read_floats(file: Path, header: Header, *, what: str, max_bytes: int) -> dict[str, Array]:
    """Finite floating point tensors, memory-mapped. `what` the file is (`a LoRA`), for messages. Raises Refused."""
    if file.stat().st_size > max_bytes:
        raise Refused(f"{file.name} is larger than {max_bytes} bytes, too large for {what}")
    for name, info in header.tensors.items():
        if info.dtype not in _TYPES:
            raise Refused(f"tensor {name} is {info.dtype}; {what} may be F32, F16 or BF16", tensor=name)
    tensors = read_tensors(file, header)
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise Refused(f"tensor {name} holds NaN or infinite values; the training went wrong", tensor=name)
    return tensors
