"""The embedded registry: one object over the database, the blob store and the cache."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scumble.errors import IntegrityError, InvalidRequest, NotFound, Refused, Unavailable
from scumble.files import explain_os_errors, new_folder, private_folder, sync_folder
from scumble_registry import publishing, results
from scumble_registry.blob import Blob
from scumble_registry.checking import Checked, check_all
from scumble_registry.formats import format_of
from scumble_registry.formats.source import Hints
from scumble_registry.hashes import FileHash, HashKind, parse_prefix, tensor_hashes
from scumble_registry.manifest import Sampling, canonical_json
from scumble_registry.publishing import PublishedFor, PublisherMetadata, ReadOptions
from scumble_registry.references import parse, parse_alias, parse_digest, parse_name
from scumble_registry.store import artifacts, catalogue
from scumble_registry.store.artifacts import Artifact, ArtifactManifest
from scumble_registry.store.blobs import BlobStore, FileStore, check
from scumble_registry.store.cache import Cache
from scumble_registry.store.catalogue import Match, Status, Unreadable, Version
from scumble_registry.store.database import Database
from scumble_registry.store.leases import WorkLease
from scumble_registry.store.paths import HomePaths

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verified:
    """What `Registry.verify` hashed."""

    versions: int
    blobs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What `Registry.collect` removed, or would."""

    blobs: int
    cached: int | None
    """Number of cache entries; None: another process has the registry open, so the cache was not cleaned."""
    unfinished: int
    bytes: int
    unreadable: tuple[Unreadable, ...] = ()
    """Rows that cannot be read. As nobody knows what they need, no blob is removed while there is one."""


class Registry:
    """Owns the database connection, the blob store, the cache and a lease on them.

    Any thread may use it, and any number of processes may have the same registry open. `close` (or `with`) ends it.
    """

    def __init__(self, lease: WorkLease, database: Database, blobs: BlobStore, cache: Cache, scratch: Path) -> None:
        self._lease = lease
        self._database = database
        self._blobs = blobs
        self._cache = cache
        self._scratch = scratch

    @classmethod
    def open(cls, home: Path, *, create: bool = False) -> Self:
        """Open the registry under `home` (SCUMBLE_HOME). Raises NotFound if there is none and `create` is not set."""
        layout = HomePaths(Path(home))
        if not layout.database.is_file():
            if not create:
                raise NotFound(
                    f"registry missing: there is none under {layout.home}; publish something "
                    "(`scumble registry publish`) to make one, or set SCUMBLE_HOME to where it is",
                    home=str(layout.home),
                )
            with explain_os_errors(layout.root):
                private_folder(layout.root)
                sync_folder(layout.home)
        blobs = FileStore(layout.root)
        with explain_os_errors(layout.lease):
            lease = WorkLease(layout.lease)
        return cls(lease, Database(layout), blobs, Cache(layout.cache, blobs), layout.scratch)

    def publish(
        self,
        path: Path,
        name: str,
        *,
        base: str | None = None,
        image_encoder: str | None = None,
        alias: str | None = None,
        license: str | None = None,  # noqa: A002 - the word of package metadata
        staged: bool = False,
        trigger_words: Iterable[str] = (),
        provenance: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        sample_grid: Path | None = None,
        card: Path | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        description: str = "",
        allow_leftover: bool = False,
        max_bytes: int | None = None,
        hints: Hints | None = None,
    ) -> Version:
        """Publish a file or folder as the next version of `name`, or return the version that has the same content.

        `image_encoder` is the encoder of an IP-Adapter that has none among its files; `sampling` is how an adapter is
        meant to be sampled. `allow_leftover` leaves unknown keys out and names them in the manifest; `max_bytes`
        replaces the size limit of the kind; `hints` is what the files may not state (make its `like` by `folder_of`).

        Atomic: whatever happens, the version is there whole or not at all. Raises InvalidRequest, NotFound,
        Refused, Incompatible (with `base` or `image_encoder`), Unavailable.
        """
        parse_name(name)
        if alias is not None:
            parse_alias(alias)
        words = (trigger_words,) if isinstance(trigger_words, str) else tuple(trigger_words)
        profile = Sampling.parse(sampling) if sampling is not None else None
        details = PublisherMetadata(
            license, description, words, provenance or {}, metrics or {}, sample_grid, card, profile
        )
        published_for = self.published_for(base) if base is not None else None
        encoder = self.resolve(image_encoder).manifest if image_encoder is not None else None
        read_options = ReadOptions(allow_leftover, max_bytes, hints or Hints())
        with self.scratch() as work:
            stored = publishing.store(Path(path), published_for, details, self._blobs, work, encoder, read_options)
        with self._database.writing() as connection:
            self._check_there(stored.manifest.blobs.values())
            status = Status.STAGED if staged else Status.APPROVED
            version = catalogue.add(connection, name, stored.manifest, status)
            catalogue.add_hashes(connection, version, stored.hashes)
            if alias is not None:
                catalogue.set_alias(connection, alias, version)
        return version

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make a temporary folder on the registry's own disk for large files. Raises Unavailable."""
        with explain_os_errors(self._scratch):
            private_folder(self._scratch)
            work = tempfile.TemporaryDirectory(prefix="work-", dir=self._scratch)
        with work as folder:
            yield Path(folder)

    def folder_of(self, like: str | Path | None) -> Callable[[], Path] | None:
        """Return what `Hints.like` takes: a function that returns a folder in the diffusers layout, or a base's files.

        `like` is such a folder or a base's reference. Raises NotFound, and Refused for another folder or kind.
        """
        if like is None:
            return None
        folder = Path(like).expanduser()
        if (folder / "model_index.json").is_file():
            return lambda: folder
        if folder.exists():
            raise Refused(f"{like} holds no model_index.json; --like names a folder in the diffusers layout, or a base")
        version = self.base(str(like))
        return lambda: self.materialise(version)

    def published_for(self, base: str) -> PublishedFor:
        """Return the base for publishing. Raises NotFound, and Refused for another kind."""
        version = self.base(base)
        return PublishedFor(version.manifest, lambda: self.materialise(version))

    def find(self, ref: str) -> Version:
        """Return the version that `ref` names, whatever its status. Raises InvalidRequest, NotFound."""
        parsed = parse(ref)
        with self._database.reading() as connection:
            return catalogue.find(connection, parsed)

    def resolve(self, ref: str) -> Version:
        """Return the version to use. Raises InvalidRequest, NotFound, and Refused when it is quarantined.

        A deprecated or staged version resolves; `Version.notice` says so.
        """
        version = self.find(ref)
        if version.status is Status.QUARANTINED:
            raise Refused(f"{version.ref} is quarantined and may not be used; choose another version", ref=version.ref)
        return version

    def base(self, ref: str) -> Version:
        """Return the base to use. Raises what `resolve` raises, and Refused for another kind."""
        version = self.resolve(ref)
        version.manifest.as_base(version.ref)
        return version

    def resolve_digest(self, digest: str) -> Version:
        """Return a version with this digest, under any name. Raises NotFound, and Refused when all are quarantined."""
        with self._database.reading() as connection:
            versions = catalogue.find_digest(connection, parse_digest(digest))
        usable = [version for version in versions if version.status is not Status.QUARANTINED]
        if versions and not usable:
            raise Refused(f"{versions[0].ref} is quarantined and may not be used", ref=versions[0].ref)
        if not usable:
            raise NotFound(f"nothing with digest {digest} is published here; publish it again", digest=digest)
        return usable[0]

    def find_hash(self, prefix: str) -> tuple[Match, ...]:
        """Return all versions, of any status, with a hash that begins with these 8 to 64 digits (see `hashes.py`).

        Versions that have no hashes yet are hashed when no other version matches. Raises InvalidRequest, NotFound.
        """
        digits = parse_prefix(prefix)
        if matches := self._matches(digits):
            return matches
        self.hash_older()
        if matches := self._matches(digits):  # or another process has hashed them meanwhile
            return matches
        raise NotFound(f"no version here has the hash {digits}; `scumble registry ls` lists the versions", hash=digits)

    def hashes(self, version: Version) -> tuple[FileHash, ...]:
        """Return all hashes of a version, sorted."""
        with self._database.reading() as connection:
            return catalogue.hashes(connection, version)

    def matches(self, hashes: Iterable[FileHash]) -> tuple[Match, ...]:
        """Return the versions that have the same files, tensors or record."""
        with self._database.reading() as connection:
            per_hash = [catalogue.find_hash(connection, hash_.hex, [hash_.kind]) for hash_ in sorted(hashes)]
        return tuple(match for matches in per_hash for match in matches if match.kind is not None)

    def hash_older(self) -> int:
        """Hash the versions that have no hashes yet, and return how many."""
        with self._database.reading() as connection:
            older = catalogue.not_hashed(connection)
        done = 0
        for version in older:
            try:
                hashes = self._hashes_of_stored(version)
            except (IntegrityError, NotFound) as error:  # `verify` lists these; the others can still be hashed
                log.warning("%s cannot be hashed: %s", version.ref, error)
                continue
            with self._database.writing() as connection:
                catalogue.add_hashes(connection, version, hashes)
            done += 1
        return done

    def names(self) -> tuple[str, ...]:
        with self._database.reading() as connection:
            return catalogue.names(connection)

    def versions(self, name: str) -> tuple[Version, ...]:
        """Return all versions of a name that can be read (see `unreadable`), oldest first. Raises NotFound."""
        parse_name(name)
        with self._database.reading() as connection:
            return catalogue.versions(connection, name)

    def unreadable(self) -> tuple[Unreadable, ...]:
        """Return the versions whose rows are damaged or of a newer scumble; all others are served."""
        with self._database.reading() as connection:
            return catalogue.all_versions(connection)[1]

    def aliases(self, name: str) -> dict[str, int]:
        parse_name(name)
        with self._database.reading() as connection:
            return catalogue.aliases(connection, name)

    def alias(self, name: str, alias: str, version: int) -> Version:
        """Make `name@alias` mean `version` from now on. Raises NotFound, Refused (quarantined)."""
        parse_alias(alias)
        parsed = parse(f"{parse_name(name)}@{version}")
        with self._database.writing() as connection:
            target = catalogue.find(connection, parsed)
            catalogue.set_alias(connection, alias, target)
        return target

    def set_status(self, ref: str, status: Status | str) -> Version:
        """Approve, deprecate, quarantine or stage. The version must be named: a bare `ns/name` is refused."""
        parsed = parse(ref)
        if ref == parsed.name:
            raise InvalidRequest(f"name one version of {ref}: {ref}@N", field="ref")
        if status not in set(Status):
            raise InvalidRequest(f"{status!r} is no status; there are {', '.join(Status)}", field="status")
        with self._database.writing() as connection:
            return catalogue.set_status(connection, catalogue.find(connection, parsed), Status(status))

    def materialise(self, version: Version) -> Path:
        """Return a read-only folder under `cache/` with the files as published, hashed at every call.

        A checkpoint needs its base. Raises IntegrityError, NotFound, Unavailable.
        """
        stored = self.stored(version)
        difference = format_of(version.manifest.kind).difference
        if difference is None:
            return stored
        base = self.stored(self.base_of(version))
        return self._cache.made(
            f"{version.digest}-whole",
            lambda folder: difference.materialise(stored, base, folder),
            lambda folder: difference.is_whole(stored, folder),
        )

    def stored(self, version: Version) -> Path:
        """Return a read-only folder with a version's stored files: for a checkpoint, its differences to its base."""
        return self._cache.folder(version.manifest, version.digest)

    def base_of(self, version: Version) -> Version:
        """Return the base that a version was published for. Raises NotFound, Refused (quarantined, or no base)."""
        if version.manifest.base is None:
            raise Refused(f"{version.ref} was published for no base; publish it again with --base REF", ref=version.ref)
        return self.resolve_digest(version.manifest.base)

    def record_path(self, version: Version) -> Path:
        """Return the record's path, hashed at every call. Raises IntegrityError, Refused for a kind without record."""
        record = version.manifest.record
        if record is None:
            raise Refused(f"{version.ref} is a {version.manifest.kind}, which has no record; use its files")
        return self._cache.blob(record, f"the record of {version.ref}", ".safetensors")

    def sample_grid_path(self, version: Version) -> Path | None:
        grid = version.manifest.sample_grid
        return self._cache.blob(grid, f"the sample grid of {version.ref}") if grid else None

    def card_path(self, version: Version) -> Path | None:
        """Return the path of the model card, README.md; None if the version has none. Raises IntegrityError."""
        card = version.manifest.card
        return self._cache.blob(card, f"the card of {version.ref}") if card else None

    def pull(self, ref: str, target: Path, *, about: bool = False) -> Version:
        """Write the files of `ref` into `target` (new or empty), all or none. Raises Refused if it is not empty.

        `about`: with the grid, the card and training.json, as a finished training leaves them (`results.py`).
        """
        version = self.resolve(ref)
        with new_folder(target) as work:
            self.copy(version, work)
            if about:
                self._write_about(version, work)
        return version

    def _write_about(self, version: Version, folder: Path) -> None:
        adapter = next(iter(version.manifest.files)) if len(version.manifest.files) == 1 else "."
        about = {results.GRID: self.sample_grid_path(version), results.CARD: self.card_path(version)}
        for name, file in about.items():
            if file is not None and not (folder / name).exists():
                shutil.copyfile(file, folder / name)
        if not (folder / results.RESULT).exists():
            results.write_result(folder, results.result_of(version, adapter))

    def copy(self, version: Version, folder: Path) -> None:
        """Write the files as published, as copies of the caller's own, into an empty folder. Raises IntegrityError."""
        difference = format_of(version.manifest.kind).difference
        if difference is None:
            self._cache.copy(version.manifest, folder)
        else:
            difference.materialise(self.stored(version), self.stored(self.base_of(version)), folder)

    def publish_artifact(
        self,
        of: Version,
        kind: str,
        key: Mapping[str, Any],
        files: Mapping[str, Path],
        provenance: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Store files built from a version; an artifact with the same key is replaced.

        Atomic, as `publish` is. Raises InvalidRequest, Unavailable.
        """
        key_json, provenance_json = (json.loads(canonical_json(dict(data))) for data in (key, provenance or {}))
        stored = {name: publishing.put_file(path, self._blobs) for name, path in files.items()}
        manifest = ArtifactManifest(kind=kind, of=of.digest, key=key_json, files=stored, provenance=provenance_json)
        with self._database.writing() as connection:
            self._check_there(manifest.files.values())
            return artifacts.put(connection, manifest)

    def artifacts(self, kind: str | None = None, of: Version | None = None) -> tuple[Artifact, ...]:
        """Return artifacts, newest first; of one kind or version, if they are given. Warns of damaged ones."""
        with self._database.reading() as connection:
            listed, unreadable = artifacts.listed(connection, kind, of.digest if of is not None else None)
        for row in unreadable:
            log.warning("%s", row.reason)
        return listed

    def artifact_folder(self, artifact: Artifact) -> Path:
        """Return a read-only folder of files, hashed at every call. Raises IntegrityError, NotFound, Unavailable."""
        return self._cache.folder(artifact.manifest, artifact.digest)

    def verify(self, ref: str | None = None) -> Verified:
        """Hash every blob of one version, or of all versions and artifacts.

        Raises IntegrityError that lists every damaged blob and row.
        """
        with self._database.reading() as connection:
            everything, unreadable = catalogue.all_versions(connection)
            built, broken = artifacts.listed(connection)
        chosen = (self.find(ref),) if ref else everything
        uses: dict[Blob, str] = {}
        for version in chosen:
            for word, blob in version.manifest.blobs.items():
                uses.setdefault(blob, f"{word} of {version.ref}")
        for artifact in () if ref else built:
            for word, blob in artifact.manifest.files.items():
                uses.setdefault(blob, f"{word} of {artifact.manifest.kind} {artifact.digest[:19]}…")
        damaged = [] if ref else [f"{row.ref}: {row.reason}" for row in unreadable + broken]
        damaged += [problem for blob, use in uses.items() if (problem := self._damage(blob, use))]
        if damaged:
            text = damaged[0] if len(damaged) == 1 else f"{len(damaged)} blobs are damaged: {'; '.join(damaged)}"
            raise IntegrityError(text, damaged=damaged)
        return Verified(len(chosen), len(uses), sum(blob.size for blob in uses))

    def check(self) -> Checked:
        """Check that database, manifests and blobs agree, without hashing; see `checking.py`. Raises Unavailable."""
        with self._database.reading() as connection:
            return check_all(connection, self._blobs)

    def collect(self, *, grace: float = 24 * 3600.0, dry_run: bool = False) -> Collected:
        """Remove unneeded files that were not touched for `grace` seconds (`dry_run`: only count them).

        These are blobs of no version and no artifact (left by failed publishers and replaced artifacts) and, while no
        other process has the registry open, cache entries and unfinished work. Safe beside other users of the
        registry: a publisher that took longer than `grace` and lost its blobs fails and may try again. Needs no free
        byte. Raises Unavailable.
        """
        before = time.time() - grace
        with explain_os_errors(self._scratch), self._database.writing() as connection:
            versions, unreadable = catalogue.all_versions(connection)
            built, broken = artifacts.listed(connection)
            unreadable += broken
            needed = {blob.digest for version in versions for blob in version.manifest.blobs.values()}
            needed |= {blob.digest for artifact in built for blob in artifact.manifest.files.values()}
            stored = self._blobs.stored() if not unreadable else ()
            idle = [blob for blob, put in stored if put < before and blob.digest not in needed]
            for blob in idle if not dry_run else ():
                self._blobs.remove(blob)
        size = sum(blob.size for blob in idle)
        with explain_os_errors(self._scratch), self._lease.alone() as alone:
            if not alone:
                return Collected(len(idle), None, 0, size, unreadable)
            cleaned = self._cache.clean(before, dry_run=dry_run)
            unfinished = [path for path in self._scratch.glob("*") if path.lstat().st_mtime < before]
            for path in unfinished if not dry_run else ():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return Collected(len(idle), cleaned.entries, len(unfinished), size + cleaned.bytes, unreadable)

    def close(self) -> None:
        self._database.close()
        self._cache.close()
        self._lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _matches(self, digits: str) -> tuple[Match, ...]:
        with self._database.reading() as connection:
            return catalogue.find_hash(connection, digits)

    def _hashes_of_stored(self, version: Version) -> list[FileHash]:
        """Return the hashes that need the stored files: of a file's data, and of a checkpoint's files as published."""
        folder = self.stored(version)
        difference = format_of(version.manifest.kind).difference
        if difference is not None:
            return [FileHash(HashKind.FILE, digest) for digest in difference.published_digests(folder)]
        return tensor_hashes(folder / name for name in version.manifest.files if name.endswith(".safetensors"))

    def _check_there(self, blobs: Iterable[Blob]) -> None:
        """Check that the blobs exist, in the transaction that adds them: afterwards `collect` does not remove them."""
        for blob in blobs:
            try:
                self._blobs.open(blob).close()
            except NotFound as error:
                raise Unavailable(f"{error.message} any more: `gc` removed it meanwhile; publish again") from error

    def _damage(self, blob: Blob, use: str) -> str | None:
        try:
            with self._blobs.open(blob) as source:
                check(source, blob, use)
        except NotFound:
            return f"{use} ({blob.digest}) is missing; publish the same file again or restore a backup"
        except IntegrityError as error:
            return error.message
        return None
