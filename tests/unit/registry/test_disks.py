"""Reading needs no writing, and gc no free byte; one damaged row is named, and all others are served."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from scumble.errors import IntegrityError, Unavailable
from scumble_registry import Registry
from scumble_registry.store.blobs import FileStore
from support.commands import Scumble, as_json
from support.disks import no_free_byte, read_only
from unit.registry.test_collect import age, blobs, leave_some_behind

LoraWriter = Callable[..., Path]


@pytest.fixture
def filled(home: Path, base: Path, lora: Path) -> Path:
    """A home with a base and a LoRA, closed by its last user."""
    with Registry.open(home, create=True) as registry:
        registry.publish(base, "demo/base")
        registry.publish(lora, "styles/ink", base="demo/base", alias="prod")
    return home


def damage(home: Path, ref: str) -> None:
    name, _, number = ref.partition("@")
    with Registry.open(home) as registry, registry._database.writing() as connection:
        which = "version = :number AND name_id = (SELECT id FROM names WHERE name = :name)"
        connection.execute(
            text(f"UPDATE versions SET manifest = replace(manifest, '\"schema', x'ff') WHERE {which}"),
            {"number": int(number), "name": name},
        )


def test_a_home_that_may_not_be_written_is_read(filled: Path, scumble: Scumble, tmp_path: Path) -> None:
    with read_only(filled):
        assert scumble("ls")[0] == scumble("show", "styles/ink@prod")[0] == scumble("fsck")[0] == 0
        assert scumble("verify")[0] == 0
        assert scumble("pull", "styles/ink", "-o", tmp_path / "out")[0] == 0
        assert scumble("publish", tmp_path / "out", "--name", "styles/again")[0] == 6
    assert not list((filled / "registry").glob("*-shm"))


def test_a_server_gets_its_files_from_a_home_that_may_not_be_written(filled: Path) -> None:
    with read_only(filled):
        with Registry.open(filled) as registry:
            version = registry.base("demo/base")
            folder = registry.materialise(version)
            assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(
                version.manifest.files
            )
            record = registry.record_path(registry.resolve("styles/ink"))
            assert record.is_file()
            assert registry.record_path(registry.resolve("styles/ink")) == record
        assert not folder.exists(), "what was made beside the home goes with its user"


def test_what_the_cache_has_is_read_where_it_lies(filled: Path) -> None:
    with Registry.open(filled) as registry:
        folder = registry.materialise(registry.base("demo/base"))
    with read_only(filled), Registry.open(filled) as registry:
        assert registry.materialise(registry.base("demo/base")) == folder


def test_a_reader_sees_what_a_writer_with_rights_commits(filled: Path, lora: Path) -> None:
    """The writer's log has an index then, which the reader must use instead of passing the log by."""
    with Registry.open(filled) as writer:
        writer.publish(lora, "styles/two", license="MIT")
        with read_only(filled), Registry.open(filled) as reader:
            assert reader.names() == ("demo/base", "styles/ink", "styles/two")


def test_nothing_in_a_log_without_its_index_is_passed_by(filled: Path, lora: Path, tmp_path: Path) -> None:
    """A copy of a home in use, without the index: what the log alone holds is read, or it is said that it cannot be."""
    copy = tmp_path / "copy"
    with Registry.open(filled) as writer:
        writer.publish(lora, "styles/two", license="MIT")
        shutil.copytree(filled, copy)
    (copy / "registry/registry.db-shm").unlink()
    with read_only(copy), pytest.raises(Unavailable, match=r"registry\.db"):
        Registry.open(copy)
    with no_free_byte(), Registry.open(copy) as reader:
        assert "styles/two" in reader.names()


def test_a_full_disk_is_read_and_collected(filled: Path, lora: Path) -> None:
    with Registry.open(filled) as registry:
        leave_some_behind(registry, lora)
    needed_and_more = blobs(filled)
    age(filled)
    with no_free_byte():
        with Registry.open(filled) as registry:
            assert registry.names() == ("demo/base", "styles/ink")
        with Registry.open(filled) as registry:
            assert registry.collect().blobs == 2
    assert blobs(filled) < needed_and_more
    with Registry.open(filled) as registry:
        assert registry.verify().versions == 2


def test_one_damaged_row_is_named_and_the_rest_is_served(
    filled: Path, write_lora: LoraWriter, scumble: Scumble, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry.open(filled) as registry:
        digest = registry.publish(write_lora("2.safetensors", seed=2), "styles/ink").digest
        registry.publish(write_lora("3.safetensors", seed=3), "other/pencil")
    damage(filled, "styles/ink@2")
    with caplog.at_level(logging.WARNING):
        listed = as_json(scumble("ls", "--json"))
    assert [entry["ref"] for entry in listed] == ["demo/base@1", "other/pencil@1", "styles/ink@1"]
    assert "styles/ink@2 cannot be read" in caplog.text
    for command in ("fsck", "verify"):
        status, _, err = scumble(command)
        assert (status, "styles/ink@2: " in err, "altered" in err) == (5, True, True), command
    with Registry.open(filled) as registry:
        assert [row.ref for row in registry.unreadable()] == ["styles/ink@2"]
        assert registry.resolve("other/pencil").version == 1
        assert registry.resolve("styles/ink@prod").version == 1
        for ref in ("styles/ink", "styles/ink@2", f"styles/ink@{digest}"):  # never another one in its place
            with pytest.raises(IntegrityError, match="altered"):
                registry.resolve(ref)


def test_gc_removes_no_blob_that_a_damaged_row_may_need(filled: Path, lora: Path, scumble: Scumble) -> None:
    with Registry.open(filled) as registry:
        leave_some_behind(registry, lora)
        registry.materialise(registry.base("demo/base"))
    damage(filled, "styles/ink@1")
    before = blobs(filled)
    age(filled)
    status, out, err = scumble("gc")
    assert (status, blobs(filled)) == (0, before)
    assert "styles/ink@1 cannot be read, so no blob was removed" in err
    assert "0 blobs, 1 entries of the cache" in out


def test_a_damaged_artifact_hides_no_other_and_keeps_all_blobs(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("x")
    with Registry.open(filled) as registry:
        base = registry.resolve("demo/base")
        for key in ("one", "two"):
            registry.publish_artifact(base, "engine", {"gpu": key}, {"engine": tmp_path / "engine"})
        with registry._database.writing() as connection:
            connection.execute(text("UPDATE artifacts SET manifest = '{}' WHERE id = 1"))
        FileStore(filled / "registry").put((tmp_path / "engine").open("rb"))
        assert [artifact.manifest.key for artifact in registry.artifacts()] == [{"gpu": "two"}]
        age(filled)
        collected = registry.collect()
        assert (collected.blobs, len(collected.unreadable)) == (0, 1)
