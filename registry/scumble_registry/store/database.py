"""The embedded database: SQLite with write-ahead log, synchronous FULL and foreign keys, migrated when opened.

Each transaction either reads (BEGIN) or writes (BEGIN IMMEDIATE: the lock is taken at once, so that two
writers queue instead of failing half-way). A writer that dies leaves nothing behind.

SQLite puts two files beside the database, the log and its index, even for a reader. Where the index cannot be made (a
folder that may not be written, a disk without a free byte), nobody is writing either, so:

- a reader opens the file as it is (`immutable`), or with the index in memory where the log holds transactions;
- a writer keeps the index in memory and the file to itself: enough for a transaction that looks and changes no row.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, OperationalError

from scumble.errors import IntegrityError, Unavailable
from scumble.files import explain_os_errors
from scumble_registry.store.paths import HomePaths

HEAD = "0003"
"""The newest migration."""
_BUSY_MS = 30_000
_NO_INDEX = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}
"""Primary result codes of SQLite where the index of the log can neither be made nor read."""


class Database:
    """Owns the engine. Any thread may use it; `close` ends it."""

    def __init__(self, layout: HomePaths) -> None:
        self._path = layout.database
        self._reader = _engine(_connect, layout.database, poolclass=QueuePool)
        self._writer = self._reader.execution_options(writes=True)
        self._unwritten = _engine(_connect_unwritten, layout.database, poolclass=NullPool)
        self._alone = _engine(_connect_alone, layout.database, poolclass=NullPool).execution_options(writes=True)
        with _explain(self._path), self.reading() as connection:
            revision = _revision(connection)
        if revision != HEAD:
            with explain_os_errors(layout.root), _locked(layout.lock), _explain(self._path):
                migrate(self._reader, self._path)

    def reading(self) -> AbstractContextManager[Connection]:
        """Open a transaction that reads a consistent view. Raises Unavailable, or IntegrityError for a damaged file."""
        return self._transaction(self._reader, self._unwritten)

    def writing(self) -> AbstractContextManager[Connection]:
        """Open a transaction that commits at the end, or rolls back on an error. One at a time over all processes."""
        return self._transaction(self._writer, self._alone)

    def close(self) -> None:
        self._reader.dispose()

    @contextmanager
    def _transaction(self, engine: Engine, without_index: Engine) -> Iterator[Connection]:
        """Begin on `engine`, or on `without_index` where the log has no index and cannot get one."""
        with _explain(self._path), ExitStack() as stack:
            try:
                connection = stack.enter_context(engine.begin())
            except OperationalError as error:
                if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF not in _NO_INDEX:
                    raise
                connection = stack.enter_context(without_index.begin())
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


def _engine(connect: Callable[[Path], sqlite3.Connection], path: Path, **options: Any) -> Engine:
    engine = create_engine("sqlite://", creator=lambda: connect(path), **options)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _connect(path: Path) -> sqlite3.Connection:
    return _prepared(sqlite3.connect(path, timeout=_BUSY_MS / 1000, check_same_thread=False))


def _connect_alone(path: Path) -> sqlite3.Connection:
    """Connect with the log's index in memory, which takes the file from all other processes."""
    connection = sqlite3.connect(path, timeout=_BUSY_MS / 1000, check_same_thread=False)
    return _prepared(connection, "locking_mode = EXCLUSIVE")


def _connect_unwritten(path: Path) -> sqlite3.Connection:
    """Connect to read a file that nobody can be writing."""
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size > 0:  # `immutable` would pass its transactions by
        return _connect_alone(path)
    return _prepared(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False))


def _prepared(connection: sqlite3.Connection, *more: str) -> sqlite3.Connection:
    """Set a new connection up, and open the log, which SQLite would put off. Raises sqlite3.OperationalError."""
    connection.isolation_level = None  # `begin` begins transactions
    connection.text_factory = _text
    try:
        for pragma in (*more, "foreign_keys = ON", "synchronous = FULL", f"busy_timeout = {_BUSY_MS}"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _text(stored: bytes) -> str:
    """Decode what may be damaged: one row that is no UTF-8 must not end the reading of all."""
    return stored.decode("utf-8", "replace")


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
