from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from scumble.errors import Unavailable
from scumble_registry import Registry, migrations
from scumble_registry.store.database import HEAD, Database
from scumble_registry.store.paths import HomePaths
from scumble_registry.store.tables import METADATA


@pytest.fixture
def database(home: Path) -> Database:
    Registry.open(home, create=True).close()
    return Database(HomePaths(home))


def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_the_database_is_durable_and_checks_references(database: Database) -> None:
    with database.reading() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys")
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert found == ["wal", 2, 1]
    with pytest.raises(IntegrityError), database.writing() as connection:
        connection.execute(text("INSERT INTO aliases VALUES (99, 'prod', 99)"))


def test_an_error_rolls_everything_back(database: Database) -> None:
    one = text("INSERT INTO names (name, kind) VALUES ('a/b', 'lora')")

    def write_then_fail() -> None:
        with database.writing() as connection:
            connection.execute(one)
            connection.execute(one)

    with pytest.raises(IntegrityError):
        write_then_fail()
    with database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM names")).scalar() == 0


def test_a_schema_of_a_newer_scumble_asks_for_an_upgrade(database: Database, home: Path) -> None:
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Unavailable, match="upgrade scumble"):
        Registry.open(home)


def test_a_half_made_registry_is_finished_by_the_next_opener(home: Path) -> None:
    (home / "registry").mkdir(parents=True)
    (home / "registry" / "registry.db").touch()
    with Registry.open(home) as registry:
        assert registry.names() == ()


def test_the_tables_compile_for_postgresql() -> None:
    for table in METADATA.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))
