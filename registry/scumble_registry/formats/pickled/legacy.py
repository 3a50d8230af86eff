"""Read torch.save's files before 1.6 (and with `_use_new_zipfile_serialization=False`), and bare pickles.

    pickle of a magic number, pickle of 1001, pickle of a dict with `little_endian`,
    pickle of the object, pickle of the list of its storages' keys,
    and for each key: how many numbers (8 bytes), then the numbers

A bare pickle is one object and nothing after it. It holds no tensor, as torch pickles tensors only in its own formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

from scumble_registry.formats.pickled.machine import MAX_PICKLE, Storage, Unsound

_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

RunPickle = Callable[[BytesIO], Any]
"""Runs one pickle from the file's current position."""


def read_legacy(
    data: memoryview, run: RunPickle, storages: dict[str, Storage], sizes: dict[str, int]
) -> tuple[Any, dict[str, tuple[int, int]], bool]:
    """Return the object, storage key → first byte and end in the file, and whether numbers are big-endian.

    Raises Unsound. `run` adds each storage that it meets to `storages`; `sizes` are bytes per number of each dtype.
    """
    file = BytesIO(bytes(data[: MAX_PICKLE + 1]))
    first = run(file)
    if first != _MAGIC_NUMBER or isinstance(first, bool):
        if file.tell() != len(data):
            raise Unsound("bytes after its end, as no pickle has")
        return first, {}, False
    if run(file) != _PROTOCOL:
        raise Unsound("an unknown version of torch.save's old format")
    system = run(file)
    if not isinstance(system, dict) or not isinstance(system.get("little_endian"), bool):
        raise Unsound("no byte order")
    root = run(file)
    keys = run(file)
    spans, end = _spans(data, file.tell(), keys, storages, sizes, big_endian=not system["little_endian"])
    if end != len(data):
        raise Unsound(f"{len(data) - end} bytes after its last tensor")
    return root, spans, not system["little_endian"]


def _spans(
    data: memoryview,
    position: int,
    keys: Any,
    storages: dict[str, Storage],
    sizes: dict[str, int],
    *,
    big_endian: bool,
) -> tuple[dict[str, tuple[int, int]], int]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != storages.keys():
        raise Unsound("a list of storages that is not that of its tensors")
    _refuse_twice(keys)
    spans: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(data[position : position + 8], "big" if big_endian else "little")
        begin = position + 8
        position = begin + count * sizes[storages[key].dtype]
        if count != storages[key].size or position > len(data):
            raise Unsound(f"a storage of {count} numbers instead of {storages[key].size}, or too few bytes for it")
        spans[key] = begin, position
    return spans, position


def _refuse_twice(keys: Iterable[str]) -> None:
    seen = set[str]()
    for key in keys:
        if key in seen:
            raise Unsound("one storage twice")
        seen.add(key)
