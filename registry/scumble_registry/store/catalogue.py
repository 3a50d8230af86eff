"""Versions, names, aliases, statuses and hashes in the database.

Functions over a connection; the caller holds the transaction. Nothing here touches blobs. What asks for one version
raises IntegrityError where its row is damaged, and Refused where a newer scumble wrote it; what lists versions leaves
such rows out and warns of each, so that one hides no other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select, update

from scumble.errors import IntegrityError, NotFound, Refused
from scumble_registry.hashes import FileHash, HashKind
from scumble_registry.manifest import Manifest
from scumble_registry.references import Reference
from scumble_registry.store.tables import ALIASES, HASHES, NAMES, VERSIONS

log = logging.getLogger(__name__)


class Status(StrEnum):
    STAGED = "staged"  # resolves only when named by version, alias or digest
    APPROVED = "approved"
    DEPRECATED = "deprecated"  # resolves with a notice
    QUARANTINED = "quarantined"  # does not resolve


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version and, as of when it was read, its status."""

    name: str
    version: int
    digest: str
    status: Status
    created: datetime
    """UTC."""
    manifest: Manifest

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def notice(self) -> str | None:
        """A warning for users of a deprecated or staged version."""
        if self.status in {Status.DEPRECATED, Status.STAGED}:
            return f"{self.ref} is {self.status}"
        return None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that is damaged, or that a newer scumble wrote, and why it cannot be read."""

    ref: str
    """`ns/name@N`, or an artifact's digest."""
    reason: str


@dataclass(frozen=True, slots=True)
class Match:
    """A version that has a hash; `kind` is None for the version's own digest."""

    version: Version
    kind: HashKind | None
    hex: str


def find(connection: Connection, ref: Reference) -> Version:
    """Return the version that `ref` names, whatever its status. Raises NotFound, naming the versions that exist."""
    query = _versions().where(NAMES.c.name == ref.name)
    if ref.version is not None:
        query = query.where(VERSIONS.c.version == ref.version)
    elif ref.digest is not None:
        query = query.where(VERSIONS.c.digest == ref.digest)
    elif ref.alias is not None:
        query = query.join(ALIASES, ALIASES.c.version_id == VERSIONS.c.id).where(ALIASES.c.alias == ref.alias)
    else:
        query = query.where(VERSIONS.c.status == Status.APPROVED).order_by(VERSIONS.c.version.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(_explain_missing(connection, ref), ref=str(ref))
    return _version(row)


def find_digest(connection: Connection, digest: str) -> tuple[Version, ...]:
    """Return all versions with this digest, sorted by name: content may be published under several names.

    Raises IntegrityError, Refused if none of them can be read.
    """
    rows = connection.execute(_versions().where(VERSIONS.c.digest == digest).order_by(NAMES.c.name)).all()
    return tuple(_readable(rows)) or tuple(_version(row) for row in rows)


def find_hash(connection: Connection, prefix: str, kinds: Iterable[HashKind] = HashKind) -> tuple[Match, ...]:
    """Return all versions with a hash of this prefix, whatever their status, sorted by name and number."""
    known = select(HASHES.c.version_id, HASHES.c.kind, HASHES.c.hex).where(
        HASHES.c.hex.between(prefix, prefix + "g"), HASHES.c.kind.in_(list(kinds))
    )
    rows = connection.execute(known).all()
    rows_found = {(row.version_id, row.kind, row.hex) for row in rows}
    own = select(VERSIONS.c.id, VERSIONS.c.digest).where(
        VERSIONS.c.digest.between(f"sha256:{prefix}", f"sha256:{prefix}g")
    )
    rows_found |= {(row.id, None, row.digest.removeprefix("sha256:")) for row in connection.execute(own)}
    matches = [
        Match(version, HashKind(kind) if kind is not None else None, hex_)
        for version_id, kind, hex_ in rows_found
        for version in _readable(connection.execute(_versions().where(VERSIONS.c.id == version_id)))
    ]
    return tuple(sorted(matches, key=lambda match: (match.version.name, match.version.version, match.kind or "")))


def add_hashes(connection: Connection, version: Version, hashes: Iterable[FileHash]) -> None:
    """Add hashes to those that the version has, and mark it as hashed."""
    version_id = connection.execute(select(_id(version))).scalar_one()
    query = select(HASHES.c.kind, HASHES.c.hex).where(HASHES.c.version_id == version_id)
    known = {FileHash(HashKind(row.kind), row.hex) for row in connection.execute(query)}
    if rows := [{"version_id": version_id, "kind": hash_.kind, "hex": hash_.hex} for hash_ in set(hashes) - known]:
        connection.execute(insert(HASHES), rows)
    connection.execute(update(VERSIONS).where(VERSIONS.c.id == version_id).values(hashed=True))


def hashes(connection: Connection, version: Version) -> tuple[FileHash, ...]:
    query = select(HASHES.c.kind, HASHES.c.hex).where(HASHES.c.version_id == _id(version))
    return tuple(sorted(FileHash(HashKind(row.kind), row.hex) for row in connection.execute(query)))


def not_hashed(connection: Connection) -> tuple[Version, ...]:
    """Return the versions that are not hashed, because they are older than hashes."""
    query = _versions().where(VERSIONS.c.hashed.is_(False)).order_by(VERSIONS.c.id)
    return tuple(_readable(connection.execute(query)))


def versions(connection: Connection, name: str) -> tuple[Version, ...]:
    """Return the versions of a name, oldest first. Raises NotFound for an unknown name."""
    rows = connection.execute(_versions().where(NAMES.c.name == name).order_by(VERSIONS.c.version)).all()
    if not rows:
        raise NotFound(_explain_missing(connection, Reference(name)), ref=name)
    return tuple(_readable(rows))


def all_versions(connection: Connection) -> tuple[tuple[Version, ...], tuple[Unreadable, ...]]:
    """Return all versions, and the rows that cannot be read, both sorted by name and number."""
    rows = list(_read(connection.execute(_versions().order_by(NAMES.c.name, VERSIONS.c.version))))
    unreadable = tuple(row for row in rows if isinstance(row, Unreadable))
    return tuple(row for row in rows if isinstance(row, Version)), unreadable


def names(connection: Connection) -> tuple[str, ...]:
    return tuple(connection.execute(select(NAMES.c.name).order_by(NAMES.c.name)).scalars())


def aliases(connection: Connection, name: str) -> dict[str, int]:
    query = (
        select(ALIASES.c.alias, VERSIONS.c.version)
        .join(VERSIONS, VERSIONS.c.id == ALIASES.c.version_id)
        .join(NAMES, NAMES.c.id == ALIASES.c.name_id)
        .where(NAMES.c.name == name)
        .order_by(ALIASES.c.alias)
    )
    return {row.alias: row.version for row in connection.execute(query)}


def add(connection: Connection, name: str, manifest: Manifest, status: Status) -> Version:
    """Return the version of `name` with this manifest: the existing one, or a new one with the next number.

    A staged version that is published again without `--staged` becomes approved. Raises Refused when the name
    holds another kind, or when this very content is quarantined.
    """
    name_id = _name_id(connection, name, manifest.kind)
    digest = manifest.digest
    query = _versions().where(VERSIONS.c.name_id == name_id, VERSIONS.c.digest == digest)
    row = connection.execute(query).one_or_none()
    if row is None:
        highest = select(func.coalesce(func.max(VERSIONS.c.version), 0)).where(VERSIONS.c.name_id == name_id)
        values = {
            "name_id": name_id,
            "version": connection.execute(highest).scalar_one() + 1,
            "digest": digest,
        }
        values |= {"manifest": manifest.canonical().decode(), "status": status}
        connection.execute(insert(VERSIONS).values(**values, created=datetime.now(UTC).replace(tzinfo=None)))
        row = connection.execute(query).one()
    version = _version(row)
    if version.status is Status.QUARANTINED:
        raise Refused(
            f"this content is {version.ref}, which is quarantined; "
            f"to use it again, `scumble registry approve {version.ref}`"
        )
    if version.status is Status.STAGED and status is Status.APPROVED:
        return set_status(connection, version, status)
    return version


def set_status(connection: Connection, version: Version, status: Status) -> Version:
    connection.execute(update(VERSIONS).where(VERSIONS.c.id == _id(version)).values(status=status))
    return find(connection, Reference(version.name, version=version.version))


def set_alias(connection: Connection, alias: str, version: Version) -> None:
    """Point an alias at a version. Raises Refused for a quarantined version."""
    if version.status is Status.QUARANTINED:
        raise Refused(f"{version.ref} is quarantined, so an alias could not resolve to it; approve it first")
    name_id = select(NAMES.c.id).where(NAMES.c.name == version.name).scalar_subquery()
    target = {"version_id": _id(version)}
    changed = connection.execute(
        update(ALIASES).where(ALIASES.c.name_id == name_id, ALIASES.c.alias == alias).values(**target)
    )
    if changed.rowcount == 0:
        connection.execute(insert(ALIASES).values(name_id=name_id, alias=alias, **target))


def _name_id(connection: Connection, name: str, kind: str) -> int:
    """Return the id of the name's row, which is made if new and locked until the transaction ends. Raises Refused."""
    query = select(NAMES.c.id, NAMES.c.kind).where(NAMES.c.name == name).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        connection.execute(insert(NAMES).values(name=name, kind=kind))
        row = connection.execute(query).one()
    if row.kind != kind:
        raise Refused(f"{name} holds versions of kind {row.kind}; publish this {kind} under another name")
    return int(row.id)


def _versions() -> Select[Any]:
    columns = (
        VERSIONS.c.version,
        VERSIONS.c.digest,
        VERSIONS.c.manifest,
        VERSIONS.c.status,
        VERSIONS.c.created,
    )
    return select(NAMES.c.name, *columns).join(NAMES, NAMES.c.id == VERSIONS.c.name_id)


def _readable(rows: Iterable[Row[Any]]) -> Iterator[Version]:
    """Yield the versions that can be read, and warn of the others."""
    for read in _read(rows):
        if isinstance(read, Version):
            yield read
        else:
            log.warning("%s cannot be read: %s", read.ref, read.reason)


def _read(rows: Iterable[Row[Any]]) -> Iterator[Version | Unreadable]:
    for row in rows:
        try:
            yield _version(row)
        except (IntegrityError, Refused) as error:
            yield Unreadable(f"{row.name}@{row.version}", error.message)


def _version(row: Row[Any]) -> Version:
    """Parse a row. Raises IntegrityError for a damaged one, Refused for one of a newer scumble."""
    return Version(
        name=row.name,
        version=row.version,
        digest=row.digest,
        status=Status(row.status),
        created=row.created.replace(tzinfo=UTC),
        manifest=Manifest.parse(_bytes(row.manifest), row.digest),
    )


def _bytes(stored: Any) -> bytes:
    """Return what stands in a row for a manifest: damage may have made a blob of the text."""
    return stored if isinstance(stored, bytes) else str(stored).encode()


def _id(version: Version) -> Any:
    return (
        select(VERSIONS.c.id)
        .join(NAMES, NAMES.c.id == VERSIONS.c.name_id)
        .where(NAMES.c.name == version.name, VERSIONS.c.version == version.version)
        .scalar_subquery()
    )


def _explain_missing(connection: Connection, ref: Reference) -> str:
    query = select(VERSIONS.c.version, VERSIONS.c.status).join(NAMES).where(NAMES.c.name == ref.name)
    there = connection.execute(query.order_by(VERSIONS.c.version)).all()
    if not there:
        return f"nothing is published as {ref.name}; `scumble registry ls` shows what is"
    listed = ", ".join(f"@{row.version} {row.status}" for row in there[-8:])
    if ref == Reference(ref.name):
        return f"{ref.name} has no approved version (it has {listed}); name one of them, or approve one"
    known = ", ".join(f"@{alias}" for alias in aliases(connection, ref.name)) or "none"
    return f"there is no {ref}; {ref.name} has {listed}; aliases: {known}"
