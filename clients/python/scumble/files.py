"""Write files and folders atomically: under another name in the same folder, then renamed.

A reader sees the old content or the new, never a part. With `durable` the content also survives a loss of power.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
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
OTHERS = 0o077
"""Rights of other users on a file."""
UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a place that may not be written, or has no room: it can still be read."""


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, in an existing folder. Several threads and processes may write it at once."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone. One that is there stays as it is."""
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def take_from_others(path: Path) -> None:
    """Take every right on a file, or on a folder and all in it, from other users. What they own stays."""
    for entry in (path, *(path.rglob("*") if path.is_dir() else ())):
        mode = stat.S_IMODE(entry.lstat().st_mode)
        if mode & OTHERS and not entry.is_symlink():
            with contextlib.suppress(PermissionError):
                entry.chmod(mode & ~OTHERS)


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it is renamed to `path` at the end, unless an error is raised."""
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
    """Yield an empty folder that replaces `target` at the end, unless an error is raised.

    One writer at a time; leftovers of a killed writer are removed. For a moment between the old folder and the new one
    there is neither.
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
    """Yield an empty folder that is renamed to `target` (new or empty) at the end, unless an error is raised.

    Raises Refused if `target` is not empty, Unavailable.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise Refused(f"{target} is not an empty folder; choose another, nothing was overwritten")
    with explain_os_errors(target), work_folder(target.parent, f".{target.name}-") as work:
        new = work / target.name
        new.mkdir()  # with the rights that the user gives to new folders, which `work` has not
        yield new
        new.replace(target)


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new empty folder in `parent` (made if missing); remove it at the end if it was not moved."""
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Write the folder's entries to the disk; its files must have been synced before."""
    _sync(folder)


@contextmanager
def explain_os_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Raise Unavailable for an OSError (disk full, no permission …), naming its file, or else `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise Unavailable(f"cannot {doing} {where}: {error.strerror}; check space and permissions") from error


def reading(chunks: Iterable[bytes | memoryview]) -> BinaryIO:
    """Return a file that reads chunks as they are generated, once, from beginning to end."""
    return io.BufferedReader(_ChunkReader(iter(chunks)), _CHUNK)


class _ChunkReader(io.RawIOBase):
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
