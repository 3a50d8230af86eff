"""`collect` removes what nothing needs, and nothing else, whoever is at work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from scumble.errors import Refused, Unavailable
from scumble_registry import Registry
from scumble_registry.formats.safetensors_header import write
from scumble_registry.store.blobs import FileStore

LoraWriter = Callable[..., Path]


def blobs(home: Path) -> set[str]:
    return {path.name for path in (home / "registry/blobs/sha256").glob("??/*")}


def age(folder: Path, hours: float = 48) -> None:
    """As if nobody had touched anything for so long."""
    then = time.time() - hours * 3600
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then), follow_symlinks=False)


def leave_some_behind(registry: Registry, lora: Path) -> None:
    """Blobs of a publication that is refused at the very end: the name holds another kind."""
    other = lora.with_name("embedding.safetensors")
    other.write_bytes(write({"<ink>": np.ones((1, 8), np.float32)}, {}))
    with pytest.raises(Refused):
        registry.publish(other, "styles/ink")


def test_what_no_version_needs_goes_and_the_rest_stays(registry: Registry, lora: Path, home: Path) -> None:
    registry.publish(lora, "styles/ink")
    needed = blobs(home)
    leave_some_behind(registry, lora)
    assert blobs(home) > needed
    age(home)
    would = registry.collect(dry_run=True)
    assert (would.blobs, blobs(home) > needed) == (2, True)
    assert registry.collect() == would
    assert blobs(home) == needed
    assert registry.verify().versions == 1
    assert registry.collect().blobs == 0


def test_what_somebody_may_still_be_publishing_stays(registry: Registry, lora: Path) -> None:
    registry.publish(lora, "styles/ink")
    leave_some_behind(registry, lora)
    assert registry.collect().blobs == 0
    assert registry.collect(grace=0).blobs == 2


def test_a_quarantined_version_keeps_its_files(registry: Registry, lora: Path, home: Path) -> None:
    registry.publish(lora, "styles/ink")
    registry.set_status("styles/ink@1", "quarantined")
    age(home)
    registry.collect()
    registry.verify()


def test_an_artifact_s_files_stay_until_another_takes_its_place(
    registry: Registry, base: Path, home: Path, tmp_path: Path
) -> None:
    version = registry.publish(base, "demo/base")
    for content in ("one", "two"):
        (tmp_path / "engine").write_text(content)
        registry.publish_artifact(version, "engine", {"gpu": "x"}, {"engine": tmp_path / "engine"})
    age(home)
    assert registry.collect().blobs == 1
    (artifact,) = registry.artifacts()
    assert (registry.artifact_folder(artifact) / "engine").read_text() == "two"


def test_the_cache_is_cleaned_of_what_was_not_used(registry: Registry, write_lora: LoraWriter, home: Path) -> None:
    old, used = (
        registry.publish(write_lora(f"{name}.safetensors", seed=seed), f"styles/{name}")
        for seed, name in enumerate(("old", "used"))
    )
    for version in (old, used):
        registry.materialise(version)
        registry.record_path(version)
    (home / "cache/.filling-x").mkdir()
    (home / "registry/tmp/left").write_bytes(b"half")
    (home / "cache/somebody-else's").mkdir()
    age(home / "cache")
    age(home / "registry/tmp")
    registry.materialise(used)
    kept = registry.record_path(used)
    done = registry.collect()
    assert (done.cached, done.unfinished) == (3, 1)
    left = {path.name for path in (home / "cache").iterdir()}
    assert left == {used.digest.removeprefix("sha256:"), "blobs", "somebody-else's"}
    assert list((home / "cache/blobs").iterdir()) == [kept]
    assert registry.materialise(old).is_dir()


def test_the_cache_is_left_alone_while_a_server_has_the_registry_open(
    registry: Registry, lora: Path, home: Path
) -> None:
    version = registry.publish(lora, "styles/ink")
    with Registry.open(home) as server:
        folder = server.materialise(version)
        age(home)
        assert registry.collect().cached is None
        assert folder.is_dir()
    age(home)
    assert registry.collect().cached == 1
    assert not folder.exists()


def test_a_publisher_whose_blobs_were_collected_fails_and_may_try_again(
    registry: Registry, lora: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FileStore.put

    def slow(store: FileStore, source: object) -> object:
        blob = put(store, source)  # type: ignore[arg-type]
        with Registry.open(home) as other:
            other.collect(grace=-1)
        return blob

    monkeypatch.setattr(FileStore, "put", slow)
    with pytest.raises(Unavailable, match="publish again"):
        registry.publish(lora, "styles/ink")
    assert registry.names() == ()
    monkeypatch.undo()
    registry.publish(lora, "styles/ink")
    registry.verify()


def test_many_publish_while_it_collects_without_pause(home: Path, write_lora: LoraWriter) -> None:
    files = [write_lora(f"{seed}.safetensors", seed=seed) for seed in range(6)]
    done = threading.Event()

    def collect() -> None:
        with Registry.open(home) as registry:
            while not done.is_set():
                registry.collect(grace=60)

    def publish(file: Path) -> None:
        with Registry.open(home) as registry:
            version = registry.publish(file, f"styles/{file.stem}")
            registry.materialise(version)

    Registry.open(home, create=True).close()
    collector = threading.Thread(target=collect)
    collector.start()
    publishers = [threading.Thread(target=publish, args=(file,)) for file in files]
    for thread in publishers:
        thread.start()
    for thread in publishers:
        thread.join()
    done.set()
    collector.join()
    with Registry.open(home) as registry:
        assert registry.verify().versions == len(files)


def test_nothing_is_removed_where_a_manifest_cannot_be_read(registry: Registry, lora: Path, home: Path) -> None:
    registry.publish(lora, "styles/ink")
    before = blobs(home)
    with registry._database.writing() as connection:
        connection.execute(text("UPDATE versions SET manifest = '{}'"))
    age(home)
    assert [row.ref for row in registry.collect().unreadable] == ["styles/ink@1"]
    assert blobs(home) == before
