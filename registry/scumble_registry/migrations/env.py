"""Run by `database.migrate` with an open connection, or by the alembic command for `--autogenerate`."""

from __future__ import annotations

from alembic import context

from scumble_registry.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
