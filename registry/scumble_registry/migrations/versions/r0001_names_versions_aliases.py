"""The first schema: names, versions, aliases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "names",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(129), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_names"),
        sa.UniqueConstraint("name", name="uq_names_name"),
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name_id", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.ForeignKeyConstraint(["name_id"], ["names.id"], name="fk_versions_name_id"),
        sa.UniqueConstraint("name_id", "version", name="uq_versions_name_id_version"),
        sa.UniqueConstraint("name_id", "digest", name="uq_versions_name_id_digest"),
        sa.CheckConstraint("version >= 1", name=op.f("ck_versions_version")),
        sa.CheckConstraint(
            "status IN ('staged', 'approved', 'deprecated', 'quarantined')", name=op.f("ck_versions_status")
        ),
    )
    op.create_table(
        "aliases",
        sa.Column("name_id", sa.Integer, nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("version_id", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("name_id", "alias", name="pk_aliases"),
        sa.ForeignKeyConstraint(["name_id"], ["names.id"], name="fk_aliases_name_id"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_aliases_version_id"),
    )


def downgrade() -> None:
    for table in ("aliases", "versions", "names"):
        op.drop_table(table)
