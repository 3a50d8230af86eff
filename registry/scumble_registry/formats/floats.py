"""Read an adapter's weights, with the checks that all kinds share: size, dtype, finite values."""

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
    """Return the tensors, memory-mapped and checked; messages call the file `what` (`a LoRA`).

    Raises Refused for a file over `max_bytes`, a tensor that is not F32, F16 or BF16, or a value that is not finite.
    """
    if file.stat().st_size > max_bytes:
        raise Refused(f"{file.name} is larger than {max_bytes} bytes, too large for {what}")
    for name, info in header.tensors.items():
        if info.dtype not in _TYPES:
            raise Refused(f"tensor {name} is {info.dtype}; {what} may be F32, F16 or BF16", tensor=name)
    tensors = read_tensors(file, header)
    check_finite(tensors)
    return tensors


def check_finite(tensors: Mapping[str, Array]) -> None:
    """Read every value once, in chunks. Raises Refused, naming the tensor that holds NaN or Inf."""
    for name, values in tensors.items():
        if not is_finite(values):
            raise Refused(f"tensor {name} holds NaN or infinite values; the training went wrong", tensor=name)


def is_finite(values: Array) -> bool:
    """Return whether all values are finite, which integers always are."""
    if values.dtype not in _BITS:
        return values.dtype.kind != "f" or bool(np.isfinite(values).all())
    flat = values.reshape(-1)
    limit = _infinity(values.dtype)
    return all(_magnitudes(flat[begin : begin + _CHUNK]).max() < limit for begin in range(0, len(flat), _CHUNK))


def largest(values: Array, axis: int) -> NDArray[np.float64]:
    """Return max |values| over `axis`; NaN is larger than Inf."""
    if values.dtype not in _BITS:
        return np.asarray(np.abs(values).max(axis), np.float64)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN warns
        return np.asarray(_magnitudes(values).max(axis).view(values.dtype), np.float64)


def _magnitudes(values: Array) -> NDArray[Any]:
    """Return the bits without the sign, as integers. They order like |values|, and compare ten times as fast, as numpy
    converts half precision for every comparison.
    """
    bits = _BITS[values.dtype]
    return np.bitwise_and(values.view(bits), bits.type(np.iinfo(bits).max >> 1))


def _infinity(dtype: np.dtype[Any]) -> int:
    return int(np.array(np.inf, dtype).view(_BITS[dtype]))
