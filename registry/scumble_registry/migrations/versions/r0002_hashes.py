"""Hashes by which a file is found, and whether a version has all of them.

What the manifests say is filled in here. What only the stored files can tell (`Registry.hash_older`) waits until
somebody asks: a migration reads no gigabytes.
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
        if rows := [{"version_id": version, "kind": kind, "hex": hex_} for kind, hex_ in _said_by(manifest)]:
            connection.execute(sa.insert(hashes), rows)


def downgrade() -> None:
    op.drop_table("hashes")
    op.drop_column("versions", "hashed")


def _said_by(manifest: str) -> list[tuple[str, str]]:
    data: dict[str, Any] = json.loads(manifest)
    found = {("file", blob["digest"]) for name, blob in data["files"].items() if name.endswith(".safetensors")}
    if record := data.get("record"):
        found.add(("record", record["digest"]))
    return sorted((kind, digest.removeprefix("sha256:")) for kind, digest in found)
