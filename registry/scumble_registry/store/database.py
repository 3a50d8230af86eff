"""The embedded database: SQLite with write-ahead log, synchronous FULL and foreign keys, migrated when opened.

Each transaction either reads (BEGIN) or writes (BEGIN IMMEDIATE: the lock is taken at once, so that two
writers queue instead of failing half-way). A writer that dies leaves nothing behind.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, OperationalError

from scumble.errors import IntegrityError, Unavailable
from scumble.files import explain_os_errors
from scumble_registry.store.paths import HomePaths

HEAD = "0003"
"""The newest migration."""
_BUSY_MS = 30_000


class Database:
    """Owns the engine. Any thread may use it; `close` ends it."""

    def __init__(self, layout: HomePaths) -> None:
        self._path = layout.database
        self._reader = _engine(layout.database)
        self._writer = self._reader.execution_options(writes=True)
        with _explain(self._path), self.reading() as connection:
            revision = _revision(connection)
        if revision != HEAD:
            with explain_os_errors(layout.root), _locked(layout.lock), _explain(self._path):
                migrate(self._reader, self._path)

    def reading(self) -> AbstractContextManager[Connection]:
        """Open a transaction that reads a consistent view. Raises Unavailable, or IntegrityError for a damaged file."""
        return self._transaction(self._reader)

    def writing(self) -> AbstractContextManager[Connection]:
        """Open a transaction that commits at the end, or rolls back on an error. One at a time over all processes."""
        return self._transaction(self._writer)

    def close(self) -> None:
        self._reader.dispose()

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        with _explain(self._path), engine.begin() as connection:
            yield connection


def migrate(engine: Engine, path: Path) -> None:
    """Bring the schema to HEAD. The caller holds the lock. Raises Unavailable for the schema of a newer scumble."""
    from alembic import command
    from alembic.config import Config

    with closing(engine.raw_connection()) as connection:
        connection.cursor().execute("PRAGMA journal_mode = WAL")  # a property of the file
    with engine.execution_options(writes=True).begin() as connection:
        revision = _revision(connection)
        if revision == HEAD:
            return
        if revision is not None and revision > HEAD:
            raise Unavailable(f"{path} has schema {revision}, newer than this scumble knows ({HEAD}); upgrade scumble")
        config = Config()
        config.set_main_option("script_location", "scumble_registry:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _engine(path: Path) -> Engine:
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": _BUSY_MS / 1000})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # `begin` below begins transactions
        for pragma in ("foreign_keys = ON", "synchronous = FULL", f"busy_timeout = {_BUSY_MS}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process or thread can have; the system releases it when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise Unavailable(f"the registry's database {path} did not answer: {error.orig}; try again") from error
    except DatabaseError as error:
        if "malformed" in str(error.orig) or "not a database" in str(error.orig):
            raise IntegrityError(f"{path} is damaged ({error.orig}); restore a backup") from error
        raise
