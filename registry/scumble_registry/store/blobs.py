"""Bytes named by their sha256, behind one small interface, which `tests/contract/test_blob_store.py` specifies.

A blob is immutable, as its name is the hash of its content. So a store needs no locks, two writers of the same bytes
do the same thing, and hashing reveals damage.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from scumble.errors import IntegrityError, NotFound
from scumble.files import explain_os_errors, private_folder, sync_folder
from scumble_registry.blob import Blob

_CHUNK = 1 << 18  # stays in the cache of a core: with a megabyte, writing took four times as long
_MODE = 0o400
"""Nobody may write a blob, and no other user read it."""


class BlobStore(Protocol):
    """A store of blobs. Safe for any number of threads and processes at once."""

    def put(self, source: BinaryIO) -> Blob:
        """Store all bytes of `source`, durably, before this returns.

        Atomic: after a failure or a crash the blob is there whole or not at all. Idempotent; storing the same
        bytes again also repairs a damaged blob. Raises Unavailable when the disk is full or not writable.
        """
        ...

    def open(self, blob: Blob) -> BinaryIO:
        """Open the bytes, unchecked. Raises NotFound."""
        ...

    def place(self, blob: Blob, target: Path) -> None:
        """Make `target` (new) a read-only file with the bytes, unchecked, the cheapest way. Raises NotFound."""
        ...

    def stored(self) -> Iterator[tuple[Blob, float]]:
        """Yield every blob, and when it was put (or used) last, in seconds since the epoch."""
        ...

    def remove(self, blob: Blob) -> None:
        """Remove a blob that nothing needs. Does nothing if it is missing."""
        ...


class FileStore:
    """A BlobStore in a folder, `blobs/sha256/ab/ab12…`.

    A blob is written under a temporary name, fsynced and renamed; then the folder is fsynced.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs" / "sha256"
        self._tmp = root / "tmp"
        self._durable: set[Path] = set()

    def path(self, blob: Blob) -> Path:
        return self._blobs / blob.hex[:2] / blob.hex

    def put(self, source: BinaryIO) -> Blob:
        with explain_os_errors(self._blobs):
            private_folder(self._tmp)
            handle, name = tempfile.mkstemp(dir=self._tmp)
            try:
                with os.fdopen(handle, "wb") as target:
                    blob = copy_and_hash(source, target)
                    target.flush()
                    os.fchmod(target.fileno(), _MODE)
                    os.fsync(target.fileno())
                self._move(Path(name), self.path(blob))
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        return blob

    def open(self, blob: Blob) -> BinaryIO:
        try:
            return self.path(blob).open("rb")
        except FileNotFoundError:
            raise _missing(blob) from None

    def place(self, blob: Blob, target: Path) -> None:
        try:
            os.link(self.path(blob), target)
        except FileNotFoundError:
            raise _missing(blob) from None
        except OSError:  # another file system, or one without links
            with self.open(blob) as source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy, _CHUNK)
                os.fchmod(copy.fileno(), _MODE)
                os.fsync(copy.fileno())

    def stored(self) -> Iterator[tuple[Blob, float]]:
        for path in sorted(self._blobs.glob("??/*")):
            try:
                stats = path.stat()
                yield Blob(digest=f"sha256:{path.name}", size=stats.st_size), stats.st_mtime
            except (FileNotFoundError, ValueError):  # removed meanwhile, or not a blob
                continue

    def remove(self, blob: Blob) -> None:
        self.path(blob).unlink(missing_ok=True)

    def _move(self, temporary: Path, final: Path) -> None:
        private_folder(final.parent)
        temporary.replace(final)
        sync_folder(final.parent)
        if final.parent not in self._durable:  # it may be new, made here or by another writer
            for folder in (self._blobs, self._blobs.parent, self._root):
                sync_folder(folder)
            self._durable.add(final.parent)


def copy_and_hash(source: BinaryIO, target: BinaryIO | None = None) -> Blob:
    """Read `source` to its end, write it to `target` if there is one, and return its digest and size."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return Blob(digest=f"sha256:{digest.hexdigest()}", size=size)


def check(source: BinaryIO, blob: Blob, what: str) -> None:
    """Hash `source`; raises IntegrityError, naming `what`, if it is not `blob`."""
    actual = copy_and_hash(source)
    if actual != blob:
        raise IntegrityError(
            f"{what} should be {blob.digest} but its {actual.size} bytes hash to {actual.digest}; "
            "publish the same file again (that rewrites the damaged copy) or restore a backup",
            digest=blob.digest,
            actual=actual.digest,
        )


def _missing(blob: Blob) -> NotFound:
    return NotFound(f"blob {blob.digest} is not in the store", digest=blob.digest)
