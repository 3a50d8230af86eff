"""Coverage-guided bytes (atheris, libFuzzer) against the readers of what comes in: `make fuzz`.

    python tests/support/fuzz_guided.py zip|pickle|header [libFuzzer's options: -max_total_time=60]

A reader may refuse, and nothing else. libFuzzer stops at any other exception, at 2 s and at 1 GB, and keeps the input.
"""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from pathlib import Path

import atheris

from support.hostile_pickles import CALLS, sound

with atheris.instrument_imports(include=["scumble_registry.formats"]):
    from scumble.errors import Refused
    from scumble_registry.formats.pickled import archive, meaning
    from scumble_registry.formats.pickled.machine import PickleMachine, Unsound
    from scumble_registry.formats.pickled.tree import Flattening
    from scumble_registry.formats.safetensors_header import read_header, read_tensors

FOLDER = Path(tempfile.mkdtemp(prefix="scumble-fuzz-"))
FILE = FOLDER / "file"


def read_zip(data: bytes) -> None:
    try:
        found = archive.read_archive(memoryview(data))
    except Unsound:
        return
    for begin, end in found.storages.values():
        assert 0 <= begin <= end <= len(data)


def read_pickle(data: bytes) -> None:
    try:
        Flattening().encode(PickleMachine(meaning.find, meaning.call, meaning.fetch).run(BytesIO(data)))
    except Unsound:
        return


def read_safetensors(data: bytes) -> None:
    FILE.write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    try:
        read_tensors(FILE, read_header(FILE))
    except Refused:
        return


TARGETS = {"zip": read_zip, "pickle": read_pickle, "header": read_safetensors}


def seeds(target: str) -> Path:
    """A folder of what each reader knows, for libFuzzer to begin with and to put its own finds into."""
    zips = [data for data in sound().values() if data.startswith(archive.MAGIC)]
    headers = [b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"__metadata__":{"x":"y"}}']
    headers.append(
        headers[0]
        .replace(b"__metadata__", b"b")
        .replace(b'{"x":"y"}', b'{"dtype":"U8","shape":[48],"data_offsets":[16,64]}')
    )
    pickles = [archive.read_archive(memoryview(data)).pickle for data in zips] + [body for body, _ in CALLS.values()]
    folder = FOLDER / target
    folder.mkdir()
    for number, data in enumerate({"zip": zips, "pickle": pickles, "header": headers}[target]):
        (folder / str(number)).write_bytes(data)
    return folder


def main() -> None:
    """libFuzzer ends the process, so the folder of its inputs stays; what it stopped at is in the working folder."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    name = sys.argv.pop(1)
    atheris.Setup([*sys.argv, str(seeds(name)), "-timeout=2", "-rss_limit_mb=2048"], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
