"""Published files by path, for readers that need paths. Filled and checked on demand; may be deleted at any time.

Folders and files are for their user alone, as the home is: files are links to blobs, or may hold as much as they do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scumble.errors import IntegrityError, Unavailable
from scumble.files import UNWRITABLE, explain_os_errors, private_folder, take_from_others, work_folder
from scumble_registry.blob import Blob
from scumble_registry.store.blobs import BlobStore, check

log = logging.getLogger(__name__)

_FILLING = ".filling-"
_ENTRY = re.compile(r"[0-9a-f]{64}(-whole)?|\.(filling|broken)-.*")


class Files(Protocol):
    """The part of a manifest that the cache reads: path (with '/') → blob."""

    @property
    def files(self) -> dict[str, Blob]: ...


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What `Cache.clean` removed. `bytes` counts only files without other links: most files are links to blobs."""

    entries: int
    bytes: int


class Cache:
    """Folders and files made from blobs. Any thread and process may fill it: each renames its own copy into place.

    Where the cache's folder cannot be written, what it lacks is made in a temporary folder, which `close` removes.
    """

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self._root = root
        self._blobs = blobs
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._making_temporary = threading.Lock()

    def close(self) -> None:
        """Remove the temporary folder. Paths that this cache returned may not be used any more."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def folder(self, manifest: Files, digest: str) -> Path:
        """Return a read-only folder with all files of a version, hashed at every call, so call it once per load.

        A damaged copy is replaced. Raises IntegrityError, Unavailable.
        """
        return self._where_writable(lambda root: self._folder(root / digest.removeprefix("sha256:"), manifest))

    def made(self, name: str, fill: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
        """Return a folder that `fill` makes, checked by `is_whole` at every call. Raises what `fill` raises."""
        return self._where_writable(lambda root: _made(root / name.removeprefix("sha256:"), fill, is_whole))

    def blob(self, blob: Blob, what: str, suffix: str = "") -> Path:
        """Return a blob as a file, hashed at every call (some 0.1 s for 100 MB). Raises IntegrityError, Unavailable."""
        return self._where_writable(lambda root: self._blob(root / "blobs" / (blob.hex + suffix), blob, what))

    def _where_writable(self, entry: Callable[[Path], Path]) -> Path:
        """Return `entry` under the cache's folder, or under the temporary one where the first cannot be written."""
        try:
            return entry(self._root)
        except Unavailable as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in UNWRITABLE:
                raise
            with self._making_temporary:
                if self._temporary is None:
                    try:
                        self._temporary = tempfile.TemporaryDirectory(prefix="scumble-cache-")
                    except OSError:
                        raise error from error.__cause__
                    log.warning("%s; using %s instead", error.message, self._temporary.name)
        return entry(Path(self._temporary.name))

    def _folder(self, final: Path, manifest: Files) -> Path:
        with explain_os_errors(final.parent):
            if not _is_whole(final, manifest):
                self._fill(manifest, final)
            elif damaged := [name for name, blob in manifest.files.items() if not _is_intact(final / name, blob)]:
                log.warning("%s in the cache is damaged (%s); copying it again", final, ", ".join(damaged))
                (final / damaged[0]).unlink()  # no longer whole, so the fill replaces it
                self._fill(manifest, final)
        _note_use(final)
        return final

    def _blob(self, path: Path, blob: Blob, what: str) -> Path:
        if not _is_intact(path, blob):
            if path.exists():
                log.warning("%s in the cache is damaged; copying it again", path)
            with explain_os_errors(path.parent.parent):
                self._place_checked(blob, path, what)
        _note_use(path)
        return path

    def copy(self, manifest: Files, target: Path) -> None:
        """Write the files as writable copies into the new folder `target`. Raises IntegrityError."""
        for name, blob in manifest.files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._blobs.open(blob) as source, path.open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 18)
            with path.open("rb") as written:
                check(written, blob, name)

    def clean(self, before: float, *, dry_run: bool) -> Cleaned:
        """Remove entries not used since `before` (seconds since the epoch). No other process may use the cache."""
        old = [path for path in self._entries() if path.lstat().st_mtime < before]
        size = sum(_bytes_held(path) for path in old)
        for path in old if not dry_run else ():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return Cleaned(len(old), size)

    def _entries(self) -> list[Path]:
        """Return the cache's own entries: other files under the folder are left alone."""
        folders = [path for path in self._root.glob("*") if _ENTRY.fullmatch(path.name)]
        return sorted(folders + list((self._root / "blobs").glob("*")))

    def _fill(self, manifest: Files, final: Path) -> None:
        private_folder(final.parent)
        with work_folder(final.parent, _FILLING) as work:
            for name, blob in manifest.files.items():
                path = work / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._blobs.place(blob, path)
                with path.open("rb") as source:
                    check(source, blob, name)
            take_from_others(work)
            _swap(work, final, manifest)

    def _place_checked(self, blob: Blob, path: Path, what: str) -> None:
        private_folder(path.parent)
        with work_folder(path.parent.parent, _FILLING) as work:
            copy = work / path.name
            self._blobs.place(blob, copy)
            with copy.open("rb") as source:
                check(source, blob, what)
            take_from_others(copy)
            copy.replace(path)


def _made(final: Path, fill: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    with explain_os_errors(final.parent):
        if final.is_dir():
            if is_whole(final):
                _note_use(final)
                return final
            log.warning("%s in the cache is damaged; making it again", final)
            shutil.rmtree(final, ignore_errors=True)
        private_folder(final.parent)
        with work_folder(final.parent, _FILLING) as work:
            fill(work)
            take_from_others(work)
            if not final.is_dir():  # another process may have made it meanwhile
                work.rename(final)
    return final


def _note_use(path: Path) -> None:
    """Set the modification time, by which `clean` selects, as reading does not change it."""
    with contextlib.suppress(OSError):  # another user's file, or removed meanwhile
        os.utime(path)


def _bytes_held(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(stats.st_size for file in files if (stats := file.lstat()).st_nlink == 1)


def _is_intact(path: Path, blob: Blob) -> bool:
    try:
        with path.open("rb") as copy:
            check(copy, blob, path.name)
    except (FileNotFoundError, IntegrityError):
        return False
    return True


def _is_whole(folder: Path, manifest: Files) -> bool:
    try:
        return all((folder / name).stat().st_size == blob.size for name, blob in manifest.files.items())
    except OSError:
        return False


def _swap(work: Path, final: Path, manifest: Files) -> None:
    """Rename `work` to `final`, unless another process made it meanwhile; an incomplete folder is replaced."""
    for _ in range(3):
        try:
            os.rename(work, final)  # noqa: PTH104 - refuses a folder that is not empty, which is what we want
        except OSError:
            if _is_whole(final, manifest):
                return
            broken = Path(tempfile.mkdtemp(prefix=".broken-", dir=final.parent))
            try:
                os.rename(final, broken)  # noqa: PTH104 - onto the empty folder
            except FileNotFoundError:
                pass
            finally:
                shutil.rmtree(broken, ignore_errors=True)
        else:
            return
    os.rename(work, final)  # noqa: PTH104 - raises the reason
