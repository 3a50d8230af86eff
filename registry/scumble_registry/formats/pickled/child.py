"""The process that reads an untrusted pickle: `python -I` without the registry's imports, under limits.

It inherits two open files, reads one, writes safetensors to the other, and prints one line of JSON: `{"tree": …}`,
`{"unsound": why}` or `{"failed": why}` (disk full). Once its limits are set it can open no file and no socket, start no
process, and use no more memory and time than its parent allows.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np  # noqa: F401 - imported before the limits, after which no file can be opened

from scumble_registry.formats.pickled import archive, legacy, meaning, tensors
from scumble_registry.formats.pickled.machine import Global, PickleMachine, Storage, Unsound
from scumble_registry.formats.pickled.tree import Flattening
from scumble_registry.formats.safetensors_header import DTYPES

_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


def main(source: int, target: int, memory: int, seconds: int, size: int) -> None:
    """Convert one file and print the answer as JSON.

    `source` and `target` are file descriptors; `memory` is the limit in bytes beside the mapped file; `seconds` of CPU
    time; `size` is the most bytes that may be written.
    """
    mapped = mmap.mmap(source, 0, access=mmap.ACCESS_READ)
    _restrict(memory + len(mapped), seconds, size)
    with os.fdopen(target, "wb") as out:
        try:
            answer: dict[str, Any] = {"tree": read(tensors.Input(source, memoryview(mapped)), out)}
        except Unsound as error:
            answer = {"unsound": str(error)}
        except MemoryError:
            answer = {"unsound": f"need of more than {memory} bytes of memory"}
        except RecursionError:
            answer = {"unsound": "lists in lists without end"}
        except OSError as error:
            answer = {"failed": error.strerror or "the file cannot be read"}
    sys.stdout.write(json.dumps(answer))


def read(source: tensors.Input, out: BinaryIO) -> Any:
    """Write the tensors of `source` to `out` and return the encoded tree. Raises Unsound, OSError."""
    storages: dict[str, Storage] = {}
    if bytes(source.data[:4]) == archive.MAGIC:
        zipped = archive.read_archive(source.data)
        root, spans, big_endian = _run(BytesIO(zipped.pickle), storages), zipped.storages, zipped.big_endian
    else:
        root, spans, big_endian = legacy.read_legacy(source.data, lambda part: _run(part, storages), storages, _SIZES)
    flattening = Flattening()
    tree = flattening.encode(root)
    tensors.write(flattening.tensors, spans, source, out, big_endian=big_endian)
    return tree


def _run(file: BytesIO, storages: dict[str, Storage]) -> Any:
    def fetch(words: Any) -> Storage | Global:
        meant = meaning.fetch(words)
        if isinstance(meant, Storage) and storages.setdefault(meant.key, meant) != meant:
            raise Unsound("one storage with two types or sizes")
        return meant

    return PickleMachine(meaning.find, meaning.call, fetch).run(file)


def _restrict(memory: int, seconds: int, size: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,  # those that are open stay open
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
