"""Hashes by which a file is found, and whether a version has all of them.

Hashes in the manifests are filled in here. Hashes that need the stored files are computed on demand
(`Registry.hash_older`), as a migration should not read gigabytes.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("hashed", sa.Boolean, nullable=False, server_default=sa.false()))
    hashes = op.create_table(
        "hashes",
        sa.Column("version_id", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("hex", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("version_id", "kind", "hex", name="pk_hashes"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_hashes_version_id"),
        sa.CheckConstraint("kind IN ('file', 'tensors', 'record')", name=op.f("ck_hashes_kind")),
    )
    op.create_index("ix_hashes_hex", "hashes", ["hex"])
    connection = op.get_bind()
    for version, manifest in connection.execute(sa.text("SELECT id, manifest FROM versions")).all():
        if rows := [{"version_id": version, "kind": kind, "hex": hex_} for kind, hex_ in _hashes_in(manifest)]:
            connection.execute(sa.insert(hashes), rows)


def downgrade() -> None:
    op.drop_table("hashes")
    op.drop_column("versions", "hashed")


def _hashes_in(manifest: str) -> list[tuple[str, str]]:
    data: dict[str, Any] = json.loads(manifest)
    hashes = {("file", blob["digest"]) for name, blob in data["files"].items() if name.endswith(".safetensors")}
    if record := data.get("record"):
        hashes.add(("record", record["digest"]))
    return sorted((kind, digest.removeprefix("sha256:")) for kind, digest in hashes)
