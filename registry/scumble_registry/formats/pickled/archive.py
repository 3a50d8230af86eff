"""Read torch.save's files since 1.6: a zip of stored entries, `<name>/data.pkl` and `<name>/data/<key>`.

Read strictly by the central directory at the end: no compressed or encrypted entry, no name twice, no path that leaves
the archive, no overlapping entries. So the sizes add up to no more than the file, and there is only one reading.
(APPNOTE.TXT 6.3.10, 4.3 and 4.5.3.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from scumble_registry.formats.pickled.machine import MAX_PICKLE, Unsound

MAGIC = b"PK\x03\x04"
MAX_ENTRIES = 40_000
_MAX_DIRECTORY = 16 << 20
_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_ENCRYPTED, _LINK = 0x2041, 0xA  # bits 0, 6 and 13 of the flags; the type of a symbolic link
_IGNORED = frozenset({"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"})


@dataclass(frozen=True, slots=True)
class Archive:
    pickle: bytes
    storages: dict[str, tuple[int, int]]
    """Storage key → its first byte and its end in the file."""
    big_endian: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    begin: int
    """Offset of its local header."""
    size: int


def read_archive(data: memoryview) -> Archive:
    """Parse the zip. Raises Unsound."""
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for entry in sorted(_directory(data), key=lambda entry: entry.begin):
        if entry.begin < position:
            raise Unsound(f"an entry, {entry.name!a}, that overlaps another")
        begin = _data_of(data, entry)
        position = begin + entry.size
        if position > len(data):
            raise Unsound(f"an entry, {entry.name!a}, that ends after the file")
        spans[entry.name] = begin, position
    return _of_torch(data, spans)


def _of_torch(data: memoryview, spans: dict[str, tuple[int, int]]) -> Archive:
    pickles = [name for name in spans if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise Unsound(f"{len(pickles)} files named data.pkl; a zip by torch.save has one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in spans or any(name.startswith(f"{prefix}code/") for name in spans):
        raise Unsound("program code in it (TorchScript); save the model's state_dict() with torch.save")
    storages: dict[str, tuple[int, int]] = {}
    for name, span in spans.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if inner.startswith("data/"):
            storages[inner.removeprefix("data/")] = span
        elif name != pickles[0] and inner not in _IGNORED:
            raise Unsound(f"an entry, {name!a}, that torch.save does not write")
    begin, end = spans[pickles[0]]
    if end - begin > MAX_PICKLE:
        raise Unsound(f"a data.pkl of {end - begin} bytes (at most {MAX_PICKLE})")
    order_begin, order_end = spans.get(f"{prefix}byteorder", (0, 0))
    order = bytes(data[order_begin : min(order_end, order_begin + 16)]) or b"little"
    if order not in {b"little", b"big"}:
        raise Unsound(f"an unknown byte order, {order!a}")
    return Archive(bytes(data[begin:end]), storages, big_endian=order == b"big")


def _directory(data: memoryview) -> Iterator[_Entry]:
    """Yield the entries of the central directory."""
    count, size, begin, limit = _end(data)
    if count > MAX_ENTRIES or size > _MAX_DIRECTORY:
        raise Unsound(f"{count} entries in {size} bytes of directory (at most {MAX_ENTRIES} in {_MAX_DIRECTORY})")
    if begin + size != limit:
        raise Unsound("a directory that is not at its end")
    position, names = begin, set[str]()
    for _ in range(count):
        if position + _ENTRY.size > limit:
            raise Unsound("a directory that ends too soon")
        fields = _ENTRY.unpack_from(data, position)
        name_size, extra_size, comment_size = fields[10:13]
        text = bytes(data[position + _ENTRY.size : position + _ENTRY.size + name_size + extra_size])
        position += _ENTRY.size + name_size + extra_size + comment_size
        if fields[0] != b"PK\x01\x02" or position > limit:
            raise Unsound("a directory that is damaged")
        name = _name(text[:name_size])
        if name in names:
            raise Unsound(f"two entries of one name, {name!a}")
        names.add(name)
        yield _entry(name, fields, text[name_size:])
    if position != limit:
        raise Unsound("a directory with more than its entries")


def _entry(name: str, fields: tuple[int, ...], extra: bytes) -> _Entry:
    flags, method = fields[3:5]
    packed, size = fields[8:10]
    begin = fields[16]
    if method != 0 or flags & _ENCRYPTED:
        raise Unsound(f"a compressed or encrypted entry, {name!a}; torch.save stores them as they are")
    if fields[15] >> 28 == _LINK or name.endswith("/"):
        raise Unsound(f"a link or a folder, {name!a}, where a file should be")
    wide = _wide(extra)
    # those that do not fit follow in this order
    numbers = [value if value != 0xFFFFFFFF else next(wide, -1) for value in (size, packed, begin)]
    if -1 in numbers or numbers[0] != numbers[1] or fields[13] != 0:
        raise Unsound(f"an entry, {name!a}, whose sizes do not agree")
    return _Entry(name, numbers[2], numbers[0])


def _wide(extra: bytes) -> Iterator[int]:
    """Yield the numbers of zip64's extra field, if there is one."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            body = extra[position + 4 : position + 4 + size]
            yield from (number for (number,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8]))
            return
        position += 4 + size


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise Unsound("an entry whose name is not UTF-8") from error
    if not name.isprintable() or "\\" in name or name.startswith("/") or {"", "..", "."} & set(name.split("/")):
        raise Unsound(f"an entry with the path {name[:200]!a}")
    return name


def _data_of(data: memoryview, entry: _Entry) -> int:
    """Return the offset of the entry's data after its local header, which must agree with the directory."""
    start = entry.begin + _LOCAL.size
    if start > len(data):
        raise Unsound(f"an entry, {entry.name!a}, that begins after the file")
    fields = _LOCAL.unpack_from(data, entry.begin)
    begin = start + fields[9]
    if fields[0] != MAGIC or fields[3] != 0 or bytes(data[start:begin]) != entry.name.encode():
        raise Unsound(f"an entry, {entry.name!a}, whose local header differs from the directory")
    return int(begin + fields[10])


def _end(data: memoryview) -> tuple[int, int, int, int]:
    """Return the number of entries, the size and offset of the directory, and where it must end. Raises Unsound."""
    place = len(data) - _END.size
    if place < 0:
        raise Unsound("no end, as if it were cut off; fetch it again")
    magic, *fields, comment = _END.unpack_from(data, place)
    if magic != b"PK\x05\x06" or comment:
        raise Unsound("no zip directory at its end, as if it were cut off; fetch it again")
    limit = place
    if place >= _LOCATOR.size + _END64.size and bytes(data[place - _LOCATOR.size :][:4]) == b"PK\x06\x07":
        _, _, limit, _ = _LOCATOR.unpack_from(data, place - _LOCATOR.size)
        if limit != place - _LOCATOR.size - _END64.size:
            raise Unsound("a zip64 directory that is not at its end")
        magic, _, _, _, *wide = _END64.unpack_from(data, limit)
        said = zip(fields, wide, (0xFFFF,) * 4 + (0xFFFFFFFF,) * 2, strict=True)
        if magic != b"PK\x06\x06" or any(narrow not in {other, none} for narrow, other, none in said):
            raise Unsound("two directories that differ")
        fields = wide
    disk, disk_of, here, count, size, begin = fields
    if disk or disk_of or here != count:
        raise Unsound("parts in other files")
    return count, size, begin, limit
