"""Reads BYTES inputs in place of Triton's own function, which makes a Python object of every element before anybody can
look at their number: 32 MB of empty elements would hold up a model for 5 seconds.

Triton calls it by its name in `triton_python_backend_utils`, and gives what it returns the input's shape.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_VALUES = 1024
"""The most values of one input that are read: images and their names, in turn, are the longest."""
_LENGTH = struct.Struct("<I")


class TooMany(np.ndarray):  # type: ignore[type-arg]
    """Stands for more elements than are read: an array of any shape, in the memory of one element."""

    def reshape(self, *shape: Any, **_order: Any) -> NDArray[Any]:
        """Return an array of this shape in which every element is the same."""
        return np.broadcast_to(np.array(b"", np.object_), *shape)


def deserialize(encoded: Any) -> NDArray[Any]:
    """Read elements, each behind its length: uint32, little-endian. Raises struct.error if they are cut."""
    content, offset = memoryview(encoded), 0
    elements: list[bytes] = []
    while offset < len(content):
        if len(elements) == MAX_VALUES:
            return np.empty(0, np.object_).view(TooMany)
        (length,) = _LENGTH.unpack_from(content, offset)
        offset += _LENGTH.size
        if offset + length > len(content):
            raise struct.error(f"an element of {length} bytes is cut at {len(content) - offset}")
        elements.append(bytes(content[offset : offset + length]))
        offset += length
    array: NDArray[Any] = np.empty(len(elements), np.object_)
    array[:] = elements
    return array
