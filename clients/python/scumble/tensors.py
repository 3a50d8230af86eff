"""Reads tensors from safetensors that others wrote, whose header the library would read whatever its length."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

_LENGTH = 8
"""Bytes of the header's length, before it."""


def load_bounded(content: bytes, max_header: int) -> dict[str, NDArray[Any]]:
    """Return name → tensor of a file whose header has at most `max_header` bytes.

    Raises ValueError for a longer one (the library takes 64 us for a tensor, however empty), for what is no
    safetensors, and for dtypes that numpy does not have.
    """
    start = content[_LENGTH : _LENGTH + 1]
    if start == b"{" and int.from_bytes(content[:_LENGTH], "little") > max_header:
        raise ValueError(f"a header of more than {max_header} bytes")
    try:
        return load(content)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"not a safetensors file with dtypes of numpy ({error})") from error
