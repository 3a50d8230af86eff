"""Store a weights file as its differences to the base's: lossless, and smaller the less the weights changed.

A delta is a safetensors file of bytes:

    header         the published file's header, so that the file can be restored byte for byte
    xor:<tensor>   XOR with the base's tensor of the same dtype and shape
    new:<tensor>   a tensor that the base does not have in this dtype and shape

Both are split into byte planes (all first bytes, all second bytes …), in which small changes leave long runs of zeros,
and compressed with zlib. A tensor that equals the base's is left out. Metadata: the published file's sha256.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from scumble.errors import IntegrityError, Refused
from scumble_registry.formats.checkpoint.text import plain
from scumble_registry.formats.safetensors_header import DTYPES, Array, header_of, read_header, read_tensors, write_file

SUFFIX = ".delta"
_FORMAT = "scumble.delta.1"


def write_delta(published: Path, base: Mapping[str, Array], target: Path) -> int:
    """Write a delta to the new file `target`; `base` are the base's tensors by plain name.

    Return the number of values that differ or are new.
    """
    header = read_header(published)
    with published.open("rb") as file:
        parts: dict[str, Array] = {"header": np.frombuffer(file.read(header.data_start), np.uint8)}
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    changed = 0
    for name, values in read_tensors(published, header).items():
        old = base.get(plain(name))
        if old is None or old.dtype != values.dtype or old.shape != values.shape:
            parts[f"new:{name}"] = _pack(_bytes(values), values.dtype.itemsize)
        elif not np.array_equal(_bytes(old), _bytes(values)):
            parts[f"xor:{name}"] = _pack(_bytes(old) ^ _bytes(values), values.dtype.itemsize)
        else:
            continue
        changed += values.size
    write_file(target, parts, {"format": _FORMAT, "sha256": digest})
    return changed


def read_delta(path: Path, base: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors that differ from the base's or are new, by their names in the published file.

    Raises IntegrityError if this is no delta to this base.
    """
    return {name: values for name, values, is_changed in _tensors(path, base) if is_changed}


def expand(path: Path, base: Mapping[str, Array], target: Path) -> None:
    """Write the published file again. Raises IntegrityError if its sha256 differs."""
    parts, digest = _open(path)
    with target.open("xb") as file:
        file.write(parts["header"].tobytes())
        for _, values, _ in _tensors(path, base):
            file.write(_bytes(values).tobytes())
    if not is_expanded(path, target):
        raise IntegrityError(
            f"{path.name} and the base do not give the published file; publish it again", digest=digest
        )


def is_expanded(path: Path, target: Path) -> bool:
    """Return whether `target` has the published file's sha256."""
    try:
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == _open(path)[1]
    except FileNotFoundError:
        return False


def published_sha256(path: Path) -> str:
    """Return the sha256, in hex, of the file that `expand` writes. Raises IntegrityError if this is no delta."""
    return _open(path)[1]


def published_names(path: Path) -> frozenset[str]:
    """Return the names of all tensors of the file that `expand` writes. Raises IntegrityError if this is no delta."""
    return frozenset(header_of(_open(path)[0]["header"].tobytes()).tensors)


def _tensors(path: Path, base: Mapping[str, Array]) -> Iterator[tuple[str, Array, bool]]:
    """Yield name, values and whether they differ from the base's, in the order of the published file."""
    parts, _ = _open(path)
    for name, info in sorted(header_of(parts["header"].tobytes()).tensors.items(), key=lambda item: item[1].begin):
        dtype, old = DTYPES[info.dtype], base.get(plain(name))
        if f"new:{name}" in parts:
            values = _unpack(parts[f"new:{name}"], dtype.itemsize)
        elif old is None:
            raise IntegrityError(
                f"{path.name} needs {name}, which this base does not have; use the base that it was made for"
            )
        elif f"xor:{name}" in parts:
            values = _unpack(parts[f"xor:{name}"], dtype.itemsize) ^ _bytes(old)
        else:
            yield name, old, False
            continue
        yield name, values.view(dtype).reshape(info.shape), True


def _open(path: Path) -> tuple[dict[str, Array], str]:
    try:
        header = read_header(path)
    except Refused as error:
        raise IntegrityError(f"{path.name} is not a delta: {error}") from error
    if header.metadata.get("format") != _FORMAT:
        raise IntegrityError(f"{path.name} is not a delta ({_FORMAT}): {header.metadata}")
    return read_tensors(path, header), header.metadata["sha256"]


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _pack(words: Array, width: int) -> Array:
    planes = np.ascontiguousarray(words.reshape(-1, width).T)
    return np.frombuffer(zlib.compress(planes.tobytes(), 6), np.uint8)


def _unpack(packed: Array, width: int) -> Array:
    planes = np.frombuffer(zlib.decompress(packed.tobytes()), np.uint8).reshape(width, -1)
    return np.ascontiguousarray(planes.T).reshape(-1)
