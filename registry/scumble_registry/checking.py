"""`fsck`: check that database, manifests and blobs agree. Quick, as it hashes no file (`verify` does).

Each check returns sentences that name what is wrong; an empty list means a sound registry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, select

from scumble_registry.blob import Blob
from scumble_registry.formats import format_of
from scumble_registry.manifest import Manifest
from scumble_registry.store import artifacts, catalogue
from scumble_registry.store.blobs import BlobStore
from scumble_registry.store.tables import ALIASES, NAMES, VERSIONS


@dataclass(frozen=True, slots=True)
class Checked:
    versions: int
    blobs: int
    unneeded: int
    """Number of blobs that no version and no artifact needs: `gc` removes them when they are old enough."""
    problems: tuple[str, ...]


def check_all(connection: Connection, blobs: BlobStore) -> Checked:
    """Run all checks in the caller's transaction; versions published meanwhile are not checked."""
    versions, unreadable = catalogue.all_versions(connection)
    manifests = {version.ref: version.manifest for version in versions}
    problems = [f"{row.ref}: {row.reason}" for row in unreadable]
    needed = {blob: f"{word} of {ref}" for ref, manifest in manifests.items() for word, blob in manifest.blobs.items()}
    of_artifacts, more = _artifacts(connection)
    needed = {**of_artifacts, **needed}
    problems += more
    problems += _database(connection)
    problems += _names(connection, manifests)
    problems += _bases(manifests)
    stored = {blob.digest: blob for blob, _ in blobs.stored()}
    problems += [problem for blob, use in needed.items() if (problem := _blob(stored, blob, use))]
    unneeded = stored.keys() - {blob.digest for blob in needed}
    return Checked(len(manifests), len(needed), len(unneeded), tuple(problems))


def _artifacts(connection: Connection) -> tuple[dict[Blob, str], list[str]]:
    listed, unreadable = artifacts.listed(connection)
    return {
        blob: f"{name} of the {artifact.manifest.kind} {artifact.digest}"
        for artifact in listed
        for name, blob in artifact.manifest.files.items()
    }, [row.reason for row in unreadable]


def _database(connection: Connection) -> list[str]:
    messages = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
    problems = [f"the database: {text}" for text in messages if text != "ok"]
    rows = connection.exec_driver_sql("PRAGMA foreign_key_check")
    return problems + [f"the database: a row of {row[0]} refers to a missing row of {row[2]}" for row in rows]


def _names(connection: Connection, manifests: dict[str, Manifest]) -> Iterator[str]:
    """Check that a name's versions have no gaps and one kind, and that its aliases point at its own versions."""
    kinds = {row.name: row.kind for row in connection.execute(select(NAMES.c.name, NAMES.c.kind))}
    numbers = defaultdict[str, list[int]](list)
    for row in connection.execute(select(NAMES.c.name, VERSIONS.c.version).join(NAMES)):
        numbers[row.name].append(row.version)
    for name, versions in sorted(numbers.items()):
        if sorted(versions) != list(range(1, len(versions) + 1)):
            yield f"{name} has versions {', '.join(map(str, sorted(versions)))}, which have gaps"
    for ref, manifest in manifests.items():
        if manifest.kind != kinds[ref.partition("@")[0]]:
            yield f"{ref} is a {manifest.kind} under a name of kind {kinds[ref.partition('@')[0]]}"
    strays = select(ALIASES.c.alias, VERSIONS.c.id).join(VERSIONS).where(VERSIONS.c.name_id != ALIASES.c.name_id)
    for row in connection.execute(strays):
        yield f"the alias {row.alias} points at a version of another name"


def _bases(manifests: dict[str, Manifest]) -> Iterator[str]:
    """Check that the base of each checkpoint is published here: a checkpoint is stored as differences to it."""
    published = {manifest.digest for manifest in manifests.values()}
    for ref, manifest in manifests.items():
        if format_of(manifest.kind).needs_base and manifest.base not in published:
            yield f"{ref} is stored as differences to the base {manifest.base}, which is missing; publish that again"


def _blob(stored: dict[str, Blob], blob: Blob, use: str) -> str | None:
    in_store = stored.get(blob.digest)
    if in_store is None:
        return f"{use} ({blob.digest}) is missing; publish the same file again or restore a backup"
    if in_store.size != blob.size:
        return f"{use} ({blob.digest}) has {in_store.size} bytes instead of {blob.size}; publish the same file again"
    return None
