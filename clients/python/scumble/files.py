"""Files and folders that are there whole or not at all: written beside their place, then renamed.

A reader meets the old content or the new one, never a part. `durable` also survives a loss of power once it returns.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from scumble.errors import Refused, Unavailable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 1 << 18


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Put `content` at `path`, in an existing folder. Any threads and processes may write there at once."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a name beside `path` to write to; what is there at the end becomes `path`, unless something is raised."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def replace_folder(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give an empty folder that takes the place of `target` at the end, unless something is raised.

    One writer at a time; what one left that was killed is removed. Between the old folder and the new one there is a
    moment with neither.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*") if durable else ():
            _sync(path)
        if durable:
            sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if durable:
        sync_folder(target.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` (new or empty) at the end, unless something is raised.

    Raises Refused where something is there, Unavailable.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise Refused(f"{target} is not an empty folder; choose another, nothing was overwritten")
    with explain_os_errors(target), work_folder(target.parent, f".{target.name}-") as work:
        yield work
        work.chmod(0o755)
        work.replace(target)


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make an empty folder in `parent` (made if missing), and remove afterwards what was not moved away."""
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put the folder's own entries on the disk; its files have to be there already."""
    _sync(folder)


@contextmanager
def explain_os_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """No room, no permission, a file where a folder should be: Unavailable, naming the file, or else `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise Unavailable(f"cannot {doing} {where}: {error.strerror}; check space and permissions") from error


def reading(chunks: Iterable[bytes | memoryview]) -> BinaryIO:
    """Make a file of pieces that are made one by one, to be read once from its beginning to its end."""
    return io.BufferedReader(_Pieces(iter(chunks)), _CHUNK)


class _Pieces(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes | memoryview]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
