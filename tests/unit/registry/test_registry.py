"""Publish, resolve, aliases, status: what the registry promises its users."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from sqlalchemy import text

from scumble.errors import IntegrityError, InvalidRequest, NotFound, Refused, Unavailable
from scumble_registry import Registry, Status
from scumble_registry.blob import Blob
from scumble_registry.formats.safetensors_header import write
from scumble_registry.store.blobs import FileStore

LoraWriter = Callable[..., Path]


def stored(home: Path, blob: Blob) -> Path:
    return FileStore(home / "registry").path(blob)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


def test_versions_are_one_two_three(registry: Registry, write_lora: LoraWriter) -> None:
    versions = [registry.publish(write_lora(seed=seed), "styles/ink").version for seed in range(3)]
    assert versions == [1, 2, 3]
    assert [version.ref for version in registry.versions("styles/ink")] == [
        "styles/ink@1",
        "styles/ink@2",
        "styles/ink@3",
    ]


def test_the_same_content_and_metadata_is_the_same_version(registry: Registry, write_lora: LoraWriter) -> None:
    first = registry.publish(write_lora("a.safetensors"), "styles/ink", metrics={"loss": 0.1})
    registry.publish(write_lora("other.safetensors", seed=1), "styles/ink")
    again = registry.publish(write_lora("b.safetensors"), "styles/ink", metrics={"loss": 0.1})
    assert again == first
    assert len(registry.versions("styles/ink")) == 2


def test_other_metadata_is_another_version(registry: Registry, lora: Path) -> None:
    first = registry.publish(lora, "styles/ink")
    assert registry.publish(lora, "styles/ink", license="MIT").version == first.version + 1


def test_two_names_may_hold_the_same_digest(registry: Registry, lora: Path) -> None:
    one, other = registry.publish(lora, "styles/ink"), registry.publish(lora, "copies/ink")
    assert one.digest == other.digest
    assert registry.names() == ("copies/ink", "styles/ink")


def test_every_form_of_reference_resolves(registry: Registry, write_lora: LoraWriter) -> None:
    first = registry.publish(write_lora(seed=0), "styles/ink", alias="prod")
    second = registry.publish(write_lora(seed=1), "styles/ink")
    assert registry.resolve("styles/ink@1") == first
    assert registry.resolve("styles/ink@prod") == first
    assert registry.resolve(f"styles/ink@{first.digest}") == first
    assert registry.resolve("styles/ink") == second


def test_bare_means_the_highest_approved(registry: Registry, write_lora: LoraWriter) -> None:
    for seed in range(4):
        registry.publish(write_lora(seed=seed), "styles/ink", staged=seed == 3)
    registry.set_status("styles/ink@3", Status.QUARANTINED)
    registry.set_status("styles/ink@2", "deprecated")
    assert registry.resolve("styles/ink").version == 1


def test_without_an_approved_version_bare_says_what_there_is(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink", staged=True)
    with pytest.raises(NotFound, match="@1 staged"):
        registry.resolve("styles/ink")
    assert registry.resolve("styles/ink@1").notice == "styles/ink@1 is staged"


def test_a_deprecated_version_resolves_and_says_so(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink")
    registry.set_status("styles/ink@1", Status.DEPRECATED)
    assert registry.resolve("styles/ink@1").notice == "styles/ink@1 is deprecated"


def test_a_quarantined_version_is_refused_by_every_reference(registry: Registry, lora: Path) -> None:
    version = registry.publish(lora, "styles/ink", alias="prod")
    registry.set_status("styles/ink@prod", Status.QUARANTINED)
    for ref in ("styles/ink@1", "styles/ink@prod", f"styles/ink@{version.digest}"):
        with pytest.raises(Refused, match="quarantined"):
            registry.resolve(ref)
    assert registry.find("styles/ink@1").status is Status.QUARANTINED


def test_quarantine_holds_against_publishing_again(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink")
    registry.set_status("styles/ink@1", Status.QUARANTINED)
    with pytest.raises(Refused, match="quarantined"):
        registry.publish(lora, "styles/ink", alias="prod")
    assert registry.aliases("styles/ink") == {}
    with pytest.raises(Refused, match="quarantined"):
        registry.alias("styles/ink", "prod", 1)


def test_publishing_a_staged_version_again_approves_it(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink", staged=True)
    assert registry.publish(lora, "styles/ink", staged=True).status is Status.STAGED
    assert registry.publish(lora, "styles/ink").status is Status.APPROVED
    assert registry.publish(lora, "styles/ink", staged=True).status is Status.APPROVED


def test_an_alias_moves_and_nothing_else_does(registry: Registry, write_lora: LoraWriter) -> None:
    first = registry.publish(write_lora(seed=0), "styles/ink", alias="prod")
    second = registry.publish(write_lora(seed=1), "styles/ink")
    registry.alias("styles/ink", "prod", 2)
    assert registry.resolve("styles/ink@prod") == second
    assert registry.resolve("styles/ink@1") == first
    assert registry.aliases("styles/ink") == {"prod": 2}


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("styles/oil", "nothing is published as styles/oil"),
        ("styles/ink@9", "there is no styles/ink@9; styles/ink has @1 approved"),
        ("styles/ink@beta", "aliases: @prod"),
        ("styles/ink@sha256:" + "0" * 64, "there is no"),
    ],
)
def test_what_is_not_there_is_not_found_and_says_what_is(registry: Registry, lora: Path, ref: str, says: str) -> None:
    registry.publish(lora, "styles/ink", alias="prod")
    with pytest.raises(NotFound, match=says):
        registry.resolve(ref)


def test_bad_input_to_the_registry_is_an_invalid_request(registry: Registry, lora: Path) -> None:
    with pytest.raises(InvalidRequest, match="ns/name"):
        registry.publish(lora, "ink")
    with pytest.raises(InvalidRequest, match="digits only"):
        registry.publish(lora, "styles/ink", alias="7")
    with pytest.raises(InvalidRequest, match="plain JSON"):
        registry.publish(lora, "styles/ink", metrics={"loss": float("nan")})
    with pytest.raises(InvalidRequest, match="trigger words"):
        registry.publish(lora, "styles/ink", trigger_words=["\x1b[31m"])
    assert registry.names() == ()
    registry.publish(lora, "styles/ink")
    with pytest.raises(InvalidRequest, match="name one version of"):
        registry.set_status("styles/ink", Status.QUARANTINED)
    with pytest.raises(InvalidRequest, match="no status"):
        registry.set_status("styles/ink@1", "burnt")


def test_a_name_holds_one_kind(registry: Registry, base: Path, lora: Path) -> None:
    registry.publish(base, "demo/base")
    with pytest.raises(Refused, match="kind base"):
        registry.publish(lora, "demo/base")


def test_a_missing_registry_is_not_found_and_not_made(home: Path) -> None:
    with pytest.raises(NotFound, match="registry missing"):
        Registry.open(home)
    assert not home.exists()


def test_a_registry_can_be_closed_and_opened_again(home: Path, lora: Path) -> None:
    with Registry.open(home, create=True) as registry:
        version = registry.publish(lora, "styles/ink", alias="prod")
    with Registry.open(home) as registry:
        assert registry.resolve("styles/ink@prod") == version


def test_a_base_comes_back_as_it_was_published(registry: Registry, base: Path) -> None:
    version = registry.publish(base, "demo/base")
    folder = registry.materialise(version)
    names = sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) == names
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in names)
    assert registry.materialise(version) == folder


def test_a_cache_that_was_emptied_is_filled_again(registry: Registry, base: Path, home: Path) -> None:
    version = registry.publish(base, "demo/base")
    folder = registry.materialise(version)
    (folder / "model_index.json").unlink()
    assert (registry.materialise(version) / "model_index.json").is_file()
    shutil.rmtree(home / "cache")
    assert (registry.materialise(version) / "model_index.json").is_file()
    assert [path.name for path in (home / "cache").iterdir()] == [folder.name]


def test_pull_writes_files_of_ones_own_and_only_into_an_empty_folder(
    registry: Registry, lora: Path, tmp_path: Path
) -> None:
    registry.publish(lora, "styles/ink")
    registry.pull("styles/ink", tmp_path / "out")
    pulled = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert pulled.read_bytes() == lora.read_bytes()
    assert os.access(pulled, os.W_OK)
    with pytest.raises(Refused, match="not an empty folder"):
        registry.pull("styles/ink", tmp_path / "out")
    assert registry.publish(tmp_path / "out", "styles/ink").version == 1


def test_verify_says_what_it_hashed(registry: Registry, lora: Path, base: Path) -> None:
    registry.publish(lora, "styles/ink")
    registry.publish(base, "demo/base")
    assert registry.verify().versions == 2
    assert registry.verify("styles/ink@1").blobs == 2


def test_a_damaged_blob_is_found_named_and_healed_by_publishing_again(
    registry: Registry, lora: Path, base: Path, home: Path
) -> None:
    ink = registry.publish(lora, "styles/ink")
    registry.publish(base, "demo/base")
    assert ink.manifest.record
    damage(stored(home, ink.manifest.record))
    with pytest.raises(IntegrityError, match=r"\(record\) of styles/ink@1") as caught:
        registry.verify()
    assert caught.value.exit_status == 5
    with pytest.raises(IntegrityError, match="record of styles/ink@1"):
        registry.record_path(ink)
    registry.verify("demo/base@1")
    registry.publish(lora, "styles/ink")
    registry.verify()
    registry.record_path(ink)


def test_a_missing_blob_is_found_too(registry: Registry, base: Path, home: Path) -> None:
    version = registry.publish(base, "demo/base")
    stored(home, version.manifest.files["model_index.json"]).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        registry.verify()


def test_a_damaged_base_is_never_materialised_or_pulled(
    registry: Registry, base: Path, home: Path, tmp_path: Path
) -> None:
    version = registry.publish(base, "demo/base")
    damage(stored(home, version.manifest.files["unet/config.json"]))
    with pytest.raises(IntegrityError, match="unet/config"):
        registry.materialise(version)
    with pytest.raises(IntegrityError, match="unet/config"):
        registry.pull("demo/base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list((home / "cache").iterdir()) == []


def test_a_copy_that_is_damaged_while_the_registry_is_open_is_replaced_at_the_next_use(
    registry: Registry, lora: Path, base: Path
) -> None:
    ink, demo = registry.publish(lora, "styles/ink"), registry.publish(base, "demo/base")
    for path in (registry.record_path(ink), registry.materialise(demo) / "unet" / "config.json"):
        good = path.read_bytes()
        path.unlink()  # a copy of its own, as on a file system without links
        path.write_bytes(b"x" * len(good))
        assert registry.record_path(ink)
        assert registry.materialise(demo)
        assert path.read_bytes() == good


def test_a_damaged_copy_of_a_record_is_replaced_from_the_store(home: Path, lora: Path) -> None:
    with Registry.open(home, create=True) as registry:
        version = registry.publish(lora, "styles/ink")
        path = registry.record_path(version)
        good = path.read_bytes()
    damage(path)
    with Registry.open(home) as registry:
        assert registry.record_path(version).read_bytes() == good


def test_a_base_has_no_record(registry: Registry, base: Path) -> None:
    with pytest.raises(Refused, match="no record"):
        registry.record_path(registry.publish(base, "demo/base"))


def test_a_sample_grid_is_kept_with_the_version(registry: Registry, lora: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    grid.write_bytes(b"\x89PNG\r\n\x1a\n...")
    version = registry.publish(lora, "styles/ink", sample_grid=grid)
    kept = registry.sample_grid_path(version)
    assert kept is not None
    assert kept.read_bytes() == grid.read_bytes()
    grid.write_bytes(b"no picture")
    with pytest.raises(InvalidRequest, match="not a PNG"):
        registry.publish(lora, "styles/ink", sample_grid=grid)


def test_nothing_there_is_not_found(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or folder"):
        registry.publish(tmp_path / "nothing", "styles/ink")


def test_what_is_no_adapter_is_refused_with_what_would_be_one(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="none of the kinds"):
        registry.publish(tmp_path / "empty", "styles/ink")
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(write({"weight": np.ones(3, np.float32)}, {}))
    with pytest.raises(Refused, match="none of the kinds"):
        registry.publish(plain, "styles/ink")


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match="cannot write"):
        Registry.open(tmp_path / "file" / "home", create=True)


def test_an_altered_manifest_in_the_database_is_an_integrity_error(home: Path, lora: Path) -> None:
    with Registry.open(home, create=True) as registry:
        registry.publish(lora, "styles/ink", license="MIT")
        with registry._database.writing() as connection:
            connection.execute(text("UPDATE versions SET manifest = replace(manifest, 'MIT', 'GPL')"))
        with pytest.raises(IntegrityError, match="altered"):
            registry.resolve("styles/ink")


def test_a_file_that_changes_while_it_is_published_is_refused(
    registry: Registry, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FileStore.put

    def put_and_touch(store: FileStore, source: BinaryIO) -> Blob:
        os.utime(lora, (1, 1))
        return put(store, source)

    monkeypatch.setattr(FileStore, "put", put_and_touch)
    with pytest.raises(Refused, match="changed while"):
        registry.publish(lora, "styles/ink")
    assert registry.names() == ()


def test_a_full_disk_is_unavailable_and_leaves_nothing(
    registry: Registry, lora: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match="No space left"):
            registry.publish(lora, "styles/ink")
    assert registry.names() == ()
    assert list((home / "registry" / "tmp").iterdir()) == []
    assert registry.publish(lora, "styles/ink").version == 1


def test_a_damaged_database_is_an_integrity_error(home: Path) -> None:
    Registry.open(home, create=True).close()
    (home / "registry" / "registry.db").write_bytes(b"not a database at all, not even nearly" * 100)
    with pytest.raises(IntegrityError, match="damaged"):
        Registry.open(home)
