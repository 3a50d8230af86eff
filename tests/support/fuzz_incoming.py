"""Mutated files against the readers of what comes in: `make fuzz` for ten thousand, a few hundred in every test run.

    python tests/support/fuzz_incoming.py --files 10000 [--seed 0]

Of each file: the reader accepts it or says why not, and nothing else; it takes no more than 2 s and 512 MB; nothing is
imported, opened or started meanwhile (Python's audit events say so); and what gets in equals what torch (weights_only)
or safetensors makes of the file, wherever these read it. Prints JSON; exits with 1 and keeps the file when one fails.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from scumble.errors import Refused
from scumble_registry.formats.incoming import kind_of
from scumble_registry.formats.pickled.machine import Unsound
from scumble_registry.formats.safetensors_header import read_header, read_tensors
from support.hostile_pickles import CANARY, hostile, number, sound, zipped
from support.pickled_reading import bits, check, read_here

SECONDS, MEMORY = 2.0, 512 << 20
_NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**47, 2**62, 2**63 - 1, 2**64 - 1)
_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
_WORDS = [
    b"posix\nsystem\n",
    b"torch\nHalfStorage\n",
    b"collections\nOrderedDict\n",
    b"__builtin__\neval\n",
    b"h\x01",
    b"q\x01",
]


def corpus() -> list[bytes]:
    """Sound files oftener than hostile ones, and none over 64 KB: what is small is mutated where it hurts."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4).half(), "empty": torch.zeros(0, 2)}
    safe = [save(tensors), save(tensors, {"format": "pt"}), save({"<ink>": torch.ones(3, dtype=torch.bfloat16)})]
    bad = [data for data, _ in hostile().values()]
    return [data for data in [*sound().values(), *safe, *safe] * 12 + bad if len(data) < 64 << 10]


def mutated(draw: random.Random, files: list[bytes]) -> bytes:
    data = draw.choice(files)
    if data.startswith(b"PK") and draw.random() < 0.6:
        return _inside_zip(draw, data, files)
    if data[8:9] == b"{" and draw.random() < 0.6:
        return _inside_header(draw, data, files)
    return _mutate(draw, data, files)


def _mutate(draw: random.Random, data: bytes, files: list[bytes]) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 1, 2, 4))):
        data = draw.choice(_MUTATIONS)(draw, data, files)
    return data


def _inside_zip(draw: random.Random, data: bytes, files: list[bytes]) -> bytes:
    """One entry mutated, and a sound zip around it again: what is behind the container's checks is reached."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return _mutate(draw, data, files)
    place = max(range(len(entries)), key=lambda i: (entries[i][0].endswith("data.pkl"), draw.random()))
    if draw.random() < 0.2:
        place = draw.randrange(len(entries))
    name, inner = entries[place]
    entries[place] = name, _mutate(draw, inner, files)
    return zipped(list(entries))


def _inside_header(draw: random.Random, data: bytes, files: list[bytes]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = _mutate(draw, data[8 : 8 + size], files)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _place(draw: random.Random, data: bytes, size: int = 1) -> int:
    return draw.randrange(max(len(data) - size, 0) + 1)


def _flip(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    place = _place(draw, data)
    return data[:place] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[place : place + 1]) + data[place + 1 :]


def _overwrite(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    size = draw.choice((1, 2, 4, 8))
    new = (draw.choice((*_NUMBERS, len(data), draw.getrandbits(16))) % 256**size).to_bytes(size, "little")
    place = _place(draw, data, size)
    return data[:place] + new + data[place + size :]


def _digits(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    """A number in JSON or in a text pickle."""
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return data
    place = draw.choice(places)
    return data[:place] + str(draw.choice((*_NUMBERS, -1, "1.5", "1e9", "true"))).encode() + data[place + 1 :]


def _cut(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    return data[: _place(draw, data)]


def _remove(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    place = _place(draw, data)
    return data[:place] + data[place + draw.randrange(1, 40) :]


def _repeat(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    place, size = _place(draw, data), draw.randrange(1, 60)
    return data[:place] + data[place : place + size] * draw.choice((2, 2, 3, 100)) + data[place + size :]


def _splice(draw: random.Random, data: bytes, files: list[bytes]) -> bytes:
    other = draw.choice(files)
    begin, place = _place(draw, other), _place(draw, data)
    return data[:place] + other[begin : begin + draw.choice((4, 20, 200, 10_000))] + data[place:]


def _insert(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    new = draw.choice((draw.choice(_OPCODES), draw.choice(_OPCODES), b"c" + draw.choice(_WORDS), b"R", b"b", b"\x81"))
    place = _place(draw, data)
    return data[:place] + new + data[place + draw.choice((0, 1)) :]


def _swap(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    a, b = sorted((_place(draw, data), _place(draw, data)))
    size = draw.randrange(1, 30)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def _operand(draw: random.Random, data: bytes, _: list[bytes]) -> bytes:
    """One opcode of a pickle with another of its kind in its place: what follows is still a pickle."""
    opcodes: dict[str, list[tuple[int, int]]] = {}
    begin, last = -1, ""
    try:
        for opcode, _argument, position in pickletools.genops(data):
            if begin >= 0:
                opcodes.setdefault(last, []).append((begin, position or 0))
            begin, last = position or 0, _kind(opcode.name)
    except ValueError:
        return data
    if not opcodes:
        return data
    kind = draw.choice(sorted(opcodes))
    begin, end = draw.choice(opcodes[kind])
    other = draw.choice(opcodes[kind])
    new = data[other[0] : other[1]]
    if kind == "INT" and draw.random() < 0.7:
        new = number(draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 12, -1, 2**31, 2**47, 2**63)))
    return data[:begin] + new + data[end:]


def _kind(opcode: str) -> str:
    return "INT" if "INT" in opcode or ("LONG" in opcode and "BIN" not in opcode) else opcode


_MUTATIONS: tuple[Callable[[random.Random, bytes, list[bytes]], bytes], ...] = (
    *(_flip, _overwrite, _digits, _cut, _remove, _repeat, _splice, _insert, _swap),
    *(_operand,) * 6,
)


class Watch:
    """Python's audit events while a reader is at work. There may be only those of opening the file that it reads."""

    def __init__(self) -> None:
        self.events: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is not None and event not in {"mmap.__new__", "object.__getattr__"}:
            self.events.append(f"{event} {arguments}"[:200])

    def during(self, action: Callable[[], Any]) -> tuple[Any, list[str]]:
        self.events = []
        try:
            return action(), self.events
        finally:
            self.events = None


def _read(path: Path) -> Any:
    kind = kind_of(path)
    if not kind:
        raise Refused("neither safetensors nor a pickle")
    if kind == "safetensors":
        header = read_header(path)
        return header, {name: values.tobytes() for name, values in read_tensors(path, header).items()}
    return read_here(path)


def theirs(path: str) -> tuple[bool, Any]:
    """Do others read it, and what is it then? In a process that may die of it."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    data = Path(path).read_bytes()
    try:
        if data[8:9] == b"{":
            return True, {name: bits(tensor) for name, tensor in load(data).items()}
        return True, torch.load(path, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever they say
        return False, None


def _check_equal(found: Any, other: Any) -> None:
    if isinstance(other, dict) and found[0].__class__.__name__ == "Header":
        assert found[1] == other
    else:
        check(found[0], other, dict(found[1]))


def fuzz(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Raises AssertionError, with the file left in `folder`."""
    files, watch, seen = corpus(), Watch(), Counter[str]()
    path, slowest = folder / "fuzzed", 0.0
    os.chdir(folder)
    path.write_bytes(files[0])
    _read(path)  # whatever is imported, is imported now
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + MEMORY, resource.RLIM_INFINITY))
    with ProcessPoolExecutor(1) as pool:
        oracle = pool
        for number in range(count):
            path.write_bytes(mutated(random.Random(f"{seed}/{number}"), files))
            begin = time.process_time()
            try:
                found, events = watch.during(lambda: _read(path))
            except (Refused, Unsound):
                seen["refused"] += 1
                found = None
            taken = time.process_time() - begin
            slowest = max(slowest, taken)
            assert taken < SECONDS, f"file {number} took {taken:.1f} s"
            assert not (folder / CANARY).exists(), f"file {number} was executed"
            if found is None:
                continue
            others = [event for event in events if not event.startswith(("open", "os.", "pathlib"))]
            assert not others, f"file {number}: {others}"
            try:
                read, other = oracle.submit(theirs, str(path)).result()
            except BrokenProcessPool:
                seen["others died"] += 1
                oracle = ProcessPoolExecutor(1)
                continue
            seen["accepted, as others read it" if read else "accepted, others do not read it"] += 1
            if read:
                _check_equal(found, other)
    return {"files": count, "seed": seed, **seen, "slowest_seconds": round(slowest, 3)}


def _memory() -> int:
    """Address space in use, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    options = argparse.ArgumentParser(description="Mutated files against the readers of what comes in.")
    options.add_argument("--files", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scumble-fuzz-"))
    try:
        print(json.dumps(fuzz(chosen.files, chosen.seed, folder), indent=2))
    except BaseException:
        print(f"the file is {folder / 'fuzzed'}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
