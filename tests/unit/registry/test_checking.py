"""`fsck` finds each thing that does not fit, and names it."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from scumble_registry import Registry
from scumble_registry.store.blobs import FileStore

LoraWriter = Callable[..., Path]


@pytest.fixture
def filled(registry: Registry, base: Path, write_base: Callable[..., Path], write_lora: LoraWriter) -> Registry:
    registry.publish(base, "demo/base")
    registry.publish(write_base("tuned", seed=1), "demo/tuned", base="demo/base")
    for seed in range(2):
        registry.publish(write_lora(f"{seed}.safetensors", seed=seed), "styles/ink", alias="prod")
    return registry


def test_a_sound_registry_has_no_problems(filled: Registry) -> None:
    found = filled.check()
    assert (found.versions, found.unneeded, found.problems) == (4, 0, ())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE versions SET manifest = replace(manifest, 'a', 'b') WHERE id = 3", "styles/ink@1: the manifest"),
        ("UPDATE versions SET version = 7 WHERE id = 4", "styles/ink has versions 1, 7, which have gaps"),
        ("UPDATE names SET kind = 'vae' WHERE name = 'styles/ink'", "styles/ink@2 is a lora under a name of kind vae"),
        ("UPDATE aliases SET version_id = 1", "the alias prod points at a version of another name"),
        ("PRAGMA foreign_keys = OFF; UPDATE aliases SET version_id = 99", "a row of aliases refers to a missing row"),
        ("DELETE FROM hashes; DELETE FROM versions WHERE id = 1", "demo/tuned@1 is stored as differences to the base"),
    ],
)
def test_what_the_database_says_wrongly_is_named(filled: Registry, home: Path, change: str, says: str) -> None:
    connection = sqlite3.connect(home / "registry/registry.db")
    connection.executescript(change)
    connection.commit()
    connection.close()
    assert any(says in problem for problem in filled.check().problems)


def test_missing_and_shortened_files_are_named(filled: Registry, home: Path) -> None:
    store = FileStore(home / "registry")
    record, file = (filled.resolve(f"styles/ink@{n}").manifest.blobs for n in (1, 2))
    missing, short = record["(record)"], file["pytorch_lora_weights.safetensors"]
    store.path(missing).unlink()
    store.path(short).unlink()
    store.path(short).write_bytes(b"short")
    problems = filled.check().problems
    assert [any(blob.digest in each for each in problems) for blob in (missing, short)] == [True, True]
    assert len(problems) == 2


def test_what_nothing_needs_is_counted_and_no_problem(filled: Registry, home: Path) -> None:
    FileStore(home / "registry").put(io.BytesIO(b"left behind"))
    found = filled.check()
    assert (found.unneeded, found.problems) == (1, ())


def test_an_altered_artifact_is_named(filled: Registry, tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("x")
    filled.publish_artifact(filled.resolve("demo/base"), "engine", {}, {"engine": tmp_path / "engine"})
    assert filled.check().problems == ()
    with filled._database.writing() as connection:
        connection.execute(text("UPDATE artifacts SET manifest = '{}'"))
    assert any("artifact" in problem for problem in filled.check().problems)
