"""Read and write safetensors, with limits: the header is checked here before anything uses it.

Layout of a file: u64 little-endian length N, N bytes of JSON (name → dtype, shape, data_offsets;
`__metadata__` holds strings), then the data. The safetensors library accepts a 51 MB header of 800 000 empty tensors
(26 s, 1.7 GB) and duplicate keys without an error; this parser refuses both.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from scumble.errors import Refused

MAX_HEADER = 8 << 20
MAX_TENSORS = 20_000
MAX_DIMS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
Array = NDArray[Any]
Buffer: TypeAlias = bytes | memoryview
_START = 64
"""Bytes of a file's beginning that tell what it is instead."""
_SHOWN = 32
"""Characters of a text in a message."""
_KNOWN_STARTS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "it is a git-lfs pointer, not the file; run `git lfs pull`, or download the file",
    ),
    (b"<!doctype html", "it is a web page; download the file itself, with a token if the site asks for a login"),
    (b"<html", "it is a web page; download the file itself, with a token if the site asks for a login"),
    (b"<?xml", "it is XML, perhaps an error of the site; open it to see, and download the file again"),
    (b"{", "it is JSON, perhaps an error of the site; open it to see, and download the file again"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
    (b"7z\xbc\xaf", "it is a 7-Zip archive; unpack it first"),
    (b"rar!", "it is a RAR archive; unpack it first"),
    (b"\x89png", "it is a picture"),
    (b"\xff\xd8\xff", "it is a picture"),
    (b"gguf", "it is GGUF, which is not read here; take the safetensors file"),
    *(
        (pickle, "it is a pickle or a zip, as torch.save writes them; save it as safetensors")
        for pickle in (b"pk\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the data."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path, name: str | None = None) -> Header:
    """Parse a file's header, and check that every tensor is inside the file and none overlap.

    Cached until the file changes, as publishing reads it several times. Raises Refused, naming the file (as `name`, if
    it is one of a folder) and the fault.
    """
    stats = path.stat()
    stamp = (stats.st_dev, stats.st_ino, stats.st_size, stats.st_mtime_ns, stats.st_ctime_ns)
    try:
        return _read_header(path, stamp)
    except (ValueError, RecursionError) as error:
        name = name or path.name
        raise Refused(f"{name} is not a sound safetensors file: {error}", file=name) from error


@lru_cache(maxsize=16)
def _read_header(path: Path, stamp: tuple[int, ...]) -> Header:
    """Raises ValueError, RecursionError."""
    size = stamp[2]
    with path.open("rb") as file:
        start = file.read(_START)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(what_it_is(start) or _no_header(start, length, size))
        file.seek(8)
        entries = _parse_json(file.read(length))
    header = _header_of(entries, 8 + length)
    _check_layout(header.tensors, size - 8 - length)
    return header


def what_it_is(start: bytes) -> str | None:
    """Return what a file is, by its first bytes, and what to do; None for what is not known."""
    if not start.strip(b"\0"):
        return "it is empty, or holds zeros only; download it again"
    begins = start.lstrip().lower()
    if what := next((what for known, what in _KNOWN_STARTS if begins.startswith(known)), None):
        return what
    text = " ".join(start.decode("utf-8", "ignore").split())
    is_text = text.isprintable() and len(text.encode()) > len(start) / 2 and b"\0" not in start
    return f"it is text, which begins with {text[:_SHOWN]!r}; download the file itself" if is_text else None


def _no_header(start: bytes, length: int, size: int) -> str:
    """Say why a file of `size` bytes cannot have the header of `length` bytes that it begins with."""
    if start[8:9] != b"{":
        return f"it begins with the bytes {start[:9].hex(' ')}, as none does; is it the right file, and whole?"
    if length > MAX_HEADER:
        return f"it claims a header of {length:,} bytes; at most {MAX_HEADER:,} are read"
    return f"it is cut off inside its header, at {size:,} bytes; download it again"


def header_of(start: bytes) -> Header:
    """Parse a header from a file's first bytes (length and JSON), which were checked when the file was published."""
    return _header_of(_parse_json(start[8:]), len(start))


def _header_of(entries: dict[str, Any], data_start: int) -> Header:
    metadata = _parse_metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, at most {MAX_TENSORS}")
    return Header({name: _parse_tensor(name, entry) for name, entry in entries.items()}, metadata, data_start)


def read_tensors(path: Path, header: Header) -> dict[str, Array]:
    """Return all tensors, memory-mapped read-only."""
    if path.stat().st_size == header.data_start:
        data: Array = np.empty(0, dtype=np.uint8)  # nothing can be mapped
    else:
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=header.data_start))
    return {
        name: data[info.begin : info.end].view(DTYPES[info.dtype]).reshape(info.shape)
        for name, info in header.tensors.items()
    }


@dataclass(frozen=True, slots=True, eq=False)
class Unwritten:
    """The content of a safetensors file to be written; equal content has equal bytes (see `layout`). Its tensors may be
    memory-mapped.
    """

    tensors: dict[str, Array]
    metadata: dict[str, str]

    def chunks(self) -> Iterator[Buffer]:
        """Yield the file's bytes; at most one tensor is copied at a time, and no contiguous one."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        shapes = {name: (names[array.dtype], array.shape) for name, array in self.tensors.items()}
        order, header = layout(shapes, self.metadata)
        yield header
        for name in order:
            yield np.ascontiguousarray(self.tensors[name]).reshape(-1).view(np.uint8).data


def write(tensors: dict[str, Array], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a whole file."""
    return b"".join(Unwritten(tensors, metadata).chunks())


def write_file(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    """Write a new file, tensor by tensor."""
    with path.open("xb") as file:
        file.writelines(Unwritten(tensors, metadata).chunks())


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[list[str], bytes]:
    """Return the names in the file's order and all bytes before the data, from name → dtype and shape.

    Wider dtypes come first, so that all data is aligned; then names in sorted order.
    """
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name in order:
        dtype, shape = tensors[name]
        end = begin + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return order, struct.pack("<Q", len(text)) + text


def _parse_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    if not isinstance(entries, dict):
        raise ValueError("the header is not a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is twice in the header")
    return result


def _parse_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


def _parse_tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype.startswith(("F8_", "F4", "F6_")):
        raise ValueError(f"tensor {name!r} is {dtype}, a float of less than 16 bits; save it as F16, BF16 or F32")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"tensor {name!r} has no sound shape (at most {MAX_DIMS} dimensions)")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no sound data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r} has shape {shape} of {dtype} but {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_layout(tensors: dict[str, TensorInfo], size: int) -> None:
    """Check that the tensors fill the data exactly: no hole, no overlap, nothing after the end. Raises ValueError."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise ValueError(f"tensor {name!r} begins at byte {info.begin}, not where the one before ends ({position})")
        position = info.end
    if position > size:
        raise ValueError(
            f"it is cut off: its tensors take {position:,} bytes, of which {size:,} are there; download it again"
        )
    if position < size:
        raise ValueError(f"the tensors take {position:,} bytes, but the file has {size:,} after its header")
