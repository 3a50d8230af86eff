"""Files that were made of a version, for some machine: an engine built of a base. They can be made again.

An artifact is bound to its version by digest and found by its *key*: everything that it was made from and for. It is
no version: it has no name, no number and no status, and making it again under the same key takes its place. So what a
key does not say must not change what the files do.
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
from scumble_registry.store.tables import ARTIFACTS


class ArtifactManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: str = Field(min_length=1, max_length=32)
    of: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """Digest of the version that it was made of."""
    key: dict[str, JsonValue]
    """All that decides what the files do, and where they run."""
    files: dict[str, Blob]
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """How it was made: times, memory, machine, warnings. Decides nothing."""

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
    """One as it is stored. `created` is UTC."""

    digest: str
    created: datetime
    manifest: ArtifactManifest

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.manifest.files.values())


def put(connection: Connection, manifest: ArtifactManifest) -> Artifact:
    """Take the place of what has the same key, if there is something. The caller holds the transaction."""
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


def listed(connection: Connection, kind: str | None = None, of: str | None = None) -> tuple[Artifact, ...]:
    """Newest first."""
    query = select(ARTIFACTS).order_by(ARTIFACTS.c.id.desc())
    if kind is not None:
        query = query.where(ARTIFACTS.c.kind == kind)
    if of is not None:
        query = query.where(ARTIFACTS.c.of == of)
    return tuple(_artifact(row) for row in connection.execute(query))


def _artifact(row: Row[Any]) -> Artifact:
    text = row.manifest.encode()
    if digest_of(text) != row.digest:
        raise IntegrityError(
            f"the manifest of artifact {row.digest} has been altered; build it again", digest=row.digest
        )
    try:
        manifest = ArtifactManifest.model_validate_json(text)
    except ValidationError as error:
        raise Refused(f"artifact {row.digest} was written by a newer scumble; upgrade to read it") from error
    return Artifact(row.digest, row.created.replace(tzinfo=UTC), manifest)
