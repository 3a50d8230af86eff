"""Artifacts: files that are built from a version for a kind of machine, such as an engine, and can be built again.

An artifact refers to its version by digest and is found by its *key*: everything that it was built from and for. It is
no version: it has no name, number or status, and a new artifact with the same key replaces it. So a key must hold
everything that changes the files' behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from sqlalchemy import Connection, Row, delete, insert, select

from scumble.errors import IntegrityError, Refused
from scumble_registry.blob import Blob
from scumble_registry.manifest import canonical_json, digest_of
from scumble_registry.store.catalogue import Unreadable
from scumble_registry.store.tables import ARTIFACTS


class ArtifactManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: str = Field(min_length=1, max_length=32)
    of: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """Digest of the version that it was built from."""
    key: dict[str, JsonValue]
    """Everything that determines the files' behaviour and the machines that they run on."""
    files: dict[str, Blob]
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """How it was built: times, memory, machine, warnings. No part of the key."""

    @property
    def key_digest(self) -> str:
        return digest_of(canonical_json({"kind": self.kind, "of": self.of, "key": self.key}))

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        return digest_of(self.canonical())


@dataclass(frozen=True, slots=True)
class Artifact:
    """A stored artifact. `created` is UTC."""

    digest: str
    created: datetime
    manifest: ArtifactManifest

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.manifest.files.values())


def put(connection: Connection, manifest: ArtifactManifest) -> Artifact:
    """Store an artifact and replace one with the same key. The caller holds the transaction."""
    connection.execute(delete(ARTIFACTS).where(ARTIFACTS.c.key == manifest.key_digest))
    created = datetime.now(UTC).replace(tzinfo=None)
    connection.execute(
        insert(ARTIFACTS).values(
            kind=manifest.kind,
            of=manifest.of,
            key=manifest.key_digest,
            digest=manifest.digest,
            manifest=manifest.canonical().decode(),
            created=created,
        )
    )
    return Artifact(manifest.digest, created.replace(tzinfo=UTC), manifest)


def listed(
    connection: Connection, kind: str | None = None, of: str | None = None
) -> tuple[tuple[Artifact, ...], tuple[Unreadable, ...]]:
    """Return artifacts, newest first, and the rows that cannot be read; `kind` and `of` (a digest) select."""
    query = select(ARTIFACTS).order_by(ARTIFACTS.c.id.desc())
    if kind is not None:
        query = query.where(ARTIFACTS.c.kind == kind)
    if of is not None:
        query = query.where(ARTIFACTS.c.of == of)
    artifacts: list[Artifact] = []
    unreadable: list[Unreadable] = []
    for row in connection.execute(query):
        try:
            artifacts.append(_artifact(row))
        except (IntegrityError, Refused) as error:
            unreadable.append(Unreadable(f"artifact {row.digest}", error.message))
    return tuple(artifacts), tuple(unreadable)


def _artifact(row: Row[Any]) -> Artifact:
    text = row.manifest if isinstance(row.manifest, bytes) else str(row.manifest).encode()
    if digest_of(text) != row.digest:
        raise IntegrityError(
            f"the manifest of artifact {row.digest} has been altered; build it again", digest=row.digest
        )
    try:
        manifest = ArtifactManifest.model_validate_json(text)
    except ValidationError as error:
        raise Refused(f"artifact {row.digest} was written by a newer scumble; upgrade to read it") from error
    return Artifact(row.digest, row.created.replace(tzinfo=UTC), manifest)
