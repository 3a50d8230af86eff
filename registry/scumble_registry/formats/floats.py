"""The weights of an adapter's file, with what is asked of all of them alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from scumble.errors import Refused
from scumble_registry.formats.safetensors_header import Array, Header, read_tensors

_TYPES = ("F32", "F16", "BF16")
_CHUNK = 1 << 18  # values: what fits a core's cache
_BITS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float32): np.dtype(np.uint32),
    np.dtype(np.float16): np.dtype(np.uint16),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
}


def read_floats(file: Path, header: Header, *, what: str, max_bytes: int) -> dict[str, Array]:
    """Finite floating point tensors, memory-mapped. `what` the file is (`a LoRA`), for messages. Raises Refused."""
    if file.stat().st_size > max_bytes:
        raise Refused(f"{file.name} is larger than {max_bytes} bytes, too large for {what}")
    for name, info in header.tensors.items():
        if info.dtype not in _TYPES:
            raise Refused(f"tensor {name} is {info.dtype}; {what} may be F32, F16 or BF16", tensor=name)
    tensors = read_tensors(file, header)
    check_finite(tensors)
    return tensors


def check_finite(tensors: Mapping[str, Array]) -> None:
    """Raises Refused, naming the tensor that holds NaN or Inf. Reads every value once, a little at a time."""
    for name, values in tensors.items():
        if not is_finite(values):
            raise Refused(f"tensor {name} holds NaN or infinite values; the training went wrong", tensor=name)


def is_finite(values: Array) -> bool:
    """Of what is no float, always."""
    if values.dtype not in _BITS:
        return values.dtype.kind != "f" or bool(np.isfinite(values).all())
    flat = values.reshape(-1)
    limit = _infinity(values.dtype)
    return all(_magnitudes(flat[begin : begin + _CHUNK]).max() < limit for begin in range(0, len(flat), _CHUNK))


def largest(values: Array, axis: int) -> NDArray[np.float64]:
    """max |values| over `axis`; NaN counts as more than Inf."""
    if values.dtype not in _BITS:
        return np.asarray(np.abs(values).max(axis), np.float64)
    with np.errstate(invalid="ignore"):  # some NaN say so when they are widened
        return np.asarray(_magnitudes(values).max(axis).view(values.dtype), np.float64)


def _magnitudes(values: Array) -> NDArray[Any]:
    """The bits without the sign. As whole numbers they are in the order of |values|, and compared ten times as fast:
    numpy knows halves only through conversion.
    """
    bits = _BITS[values.dtype]
    return np.bitwise_and(values.view(bits), bits.type(np.iinfo(bits).max >> 1))


def _infinity(dtype: np.dtype[Any]) -> int:
    return int(np.array(np.inf, dtype).view(_BITS[dtype]))
