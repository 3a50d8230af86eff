"""The database's tables, in SQLAlchemy Core so that they also fit PostgreSQL. Migrations create them."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

NAMES = Table(
    "names",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String(129), nullable=False, unique=True),
    Column("kind", String(32), nullable=False),
)

VERSIONS = Table(
    "versions",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name_id", ForeignKey("names.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("manifest", Text, nullable=False),  # canonical JSON; the digest is its sha256
    Column("status", String(16), nullable=False),
    Column("created", DateTime, nullable=False),  # UTC
    Column("hashed", Boolean, nullable=False, server_default=false()),  # HASHES has all hashes of it
    UniqueConstraint("name_id", "version"),
    UniqueConstraint("name_id", "digest"),
    CheckConstraint("version >= 1", name="version"),
    CheckConstraint("status IN ('staged', 'approved', 'deprecated', 'quarantined')", name="status"),
)

ALIASES = Table(
    "aliases",
    METADATA,
    Column("name_id", ForeignKey("names.id"), primary_key=True),
    Column("alias", String(64), primary_key=True),
    Column("version_id", ForeignKey("versions.id"), nullable=False),
)

HASHES = Table(
    "hashes",
    METADATA,
    Column("version_id", ForeignKey("versions.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),  # `hashes.HashKind`
    Column("hex", String(64), primary_key=True),
    CheckConstraint("kind IN ('file', 'tensors', 'record')", name="kind"),
    Index("ix_hashes_hex", "hex"),
)

ARTIFACTS = Table(
    "artifacts",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("of", String(71), nullable=False),  # digest of the version that it was built from
    Column("key", String(71), nullable=False, unique=True),
    Column("digest", String(71), nullable=False),
    Column("manifest", Text, nullable=False),  # canonical JSON; the digest is its sha256
    Column("created", DateTime, nullable=False),  # UTC
)
