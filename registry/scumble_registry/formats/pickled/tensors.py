"""Write views of storages as the tensors of a safetensors file, after checking them.

A view reads a storage at `offset + Σ index·stride`. A view that reaches outside its storage, or is larger than it (an
expanded view: a kilobyte with the shape of a terabyte), is refused before anything is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from scumble_registry.formats.pickled.machine import Storage, Unsound, View
from scumble_registry.formats.safetensors_header import DTYPES, MAX_DIMS, MAX_HEADER, layout

Spans = Mapping[str, tuple[int, int]]
"""Storage key → its first byte and its end in the file."""

_CHUNK = 1 << 18
_MAX_COPIES = 4  # of numbers that several tensors share, as safetensors shares none


@dataclass(frozen=True, slots=True)
class Input:
    """An open file, and its mapping. Copies read the file, as pages of the mapping count as memory."""

    file: int
    data: memoryview


def write(views: Mapping[str, View], spans: Spans, source: Input, target: BinaryIO, *, big_endian: bool) -> None:
    """Check all views and write the file. Raises Unsound before the first byte is written, OSError on a full disk."""
    if not views:
        raise Unsound("no tensors: there are no weights in it")
    for name, view in views.items():
        _check(name, view, spans)
    total = sum(_size(view) for view in views.values())
    stored = sum(end - begin for begin, end in spans.values())
    if total > _MAX_COPIES * stored + _CHUNK:
        raise Unsound(f"tensors that share numbers and would take {total} bytes apart, of {stored}")
    order, header = layout({name: (view.dtype, view.shape) for name, view in views.items()}, {"format": "pt"})
    if len(header) - 8 > MAX_HEADER:
        raise Unsound(f"names and shapes of {len(header)} bytes (at most {MAX_HEADER})")
    target.write(header)
    target.flush()
    for name in order:
        view = views[name]
        if view.strides == _contiguous(view.shape) or math.prod(view.shape) <= 1:
            begin = spans[view.storage.key][0] + view.offset * DTYPES[view.dtype].itemsize
            if not big_endian:
                _copy(source, target, begin, _size(view))
                continue
        _gather(view, spans, source, target, big_endian=big_endian)


def _check(name: str, view: View, spans: Spans) -> None:
    if len(view.shape) > MAX_DIMS or len(view.shape) != len(view.strides):
        raise Unsound(f"a tensor, {name!a}, of {len(view.shape)} dimensions (at most {MAX_DIMS})")
    begin, end = spans.get(view.storage.key, (0, -1))
    if end - begin != _bytes_of(view.storage):
        raise Unsound(f"a tensor, {name!a}, whose numbers are missing or of another count")
    count = math.prod(view.shape)
    if count == 0:
        return
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    itemsize = DTYPES[view.dtype].itemsize
    if (last + 1) * itemsize > end - begin or count * itemsize > end - begin:
        raise Unsound(
            f"a tensor, {name!a}, of shape {view.shape} and strides {view.strides} in {end - begin} bytes; "
            "save a clone of it (`tensor.clone()`)"
        )


def _bytes_of(storage: Storage) -> int:
    return storage.size * DTYPES[storage.dtype].itemsize


def _size(view: View) -> int:
    return math.prod(view.shape) * DTYPES[view.dtype].itemsize


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _copy(source: Input, target: BinaryIO, begin: int, size: int) -> None:
    end = begin + size
    while begin < end:
        chunk = os.pread(source.file, min(_CHUNK, end - begin), begin)
        if not chunk:
            raise Unsound("an end before its last tensor: it was changed while it was read")
        target.write(chunk)
        begin += len(chunk)


def _gather(view: View, spans: Spans, source: Input, target: BinaryIO, *, big_endian: bool) -> None:
    """Write a strided or big-endian view in the tensor's order as little-endian, in chunks."""
    if math.prod(view.shape) == 0:
        return
    begin, end = spans[view.storage.key]
    itemsize = DTYPES[view.dtype].itemsize
    words = np.frombuffer(source.data[begin:end], dtype=f"{'>' if big_endian else '<'}u{itemsize}")
    strided = np.lib.stride_tricks.as_strided(
        words[view.offset :], view.shape, [stride * itemsize for stride in view.strides], writeable=False
    )
    chunks = np.nditer(
        strided,
        flags=["external_loop", "buffered"],
        order="C",
        op_dtypes=[np.dtype(f"<u{itemsize}")],
        casting="equiv",
        buffersize=_CHUNK // itemsize,
    )
    target.writelines(np.ascontiguousarray(chunk).data for chunk in chunks)
    target.flush()
