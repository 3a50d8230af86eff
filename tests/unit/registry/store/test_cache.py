"""The cache of materialised versions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scumble_registry import Registry

BaseWriter = LoraWriter = Callable[..., Path]


def test_callers_that_materialise_at_once_get_the_same_whole_folder(
    registry: Registry, write_base: BaseWriter, home: Path
) -> None:
    version = registry.publish(write_base(), "demo/base")
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: registry.materialise(version), range(16)))
    assert len(folders) == 1
    assert [path.name for path in (home / "cache").iterdir()] == [folders.pop().name]


def modes(folder: Path) -> set[str]:
    """Return the rights of the group and of others on a folder and all in it."""
    return {oct(path.stat().st_mode & 0o077) for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_whatever_is_published_is_for_its_user_alone(
    registry: Registry, write_base: BaseWriter, write_lora: LoraWriter, home: Path, tmp_path: Path
) -> None:
    base, lora = registry.publish(write_base(), "demo/base"), registry.publish(write_lora(), "styles/ink")
    tuned = registry.publish(write_base(seed=2), "styles/tuned", base="demo/base")
    assert tuned.manifest.kind == "dreambooth"
    (tmp_path / "plan").write_bytes(b"plan")
    artifact = registry.publish_artifact(base, "engine", {"sm": 90}, {"plan": tmp_path / "plan"})
    made = [registry.materialise(base), registry.materialise(tuned), registry.record_path(lora)]
    made.append(registry.artifact_folder(artifact))
    for path in (home / "cache", home / "registry" / "blobs", home / "registry" / "tmp"):
        assert modes(path) == {"0o0"}, path
    assert all(os.access(path, os.R_OK) for folder in made for path in [folder, *folder.rglob("*")])


@pytest.mark.usefixtures("open_umask")
def test_blobs_of_an_older_scumble_are_taken_from_others_when_they_are_used(
    registry: Registry, write_base: BaseWriter, home: Path
) -> None:
    version = registry.publish(write_base(), "demo/base")
    for blob in (home / "registry" / "blobs").rglob("*"):
        blob.chmod(0o755 if blob.is_dir() else 0o444)
    assert modes(registry.materialise(version)) == {"0o0"}


@pytest.mark.usefixtures("open_umask")
def test_what_is_pulled_has_the_rights_that_its_user_gives_to_files(
    registry: Registry, write_base: BaseWriter, tmp_path: Path
) -> None:
    registry.publish(write_base(), "demo/base")
    registry.publish(write_base(seed=2), "styles/tuned", base="demo/base")
    for mask, rights in ((0o022, {"0o755", "0o644"}), (0o077, {"0o700", "0o600"})):
        os.umask(mask)
        for ref in ("demo/base", "styles/tuned"):
            out = tmp_path / f"{mask}" / ref
            registry.pull(ref, out)
            assert {oct(path.stat().st_mode & 0o777) for path in [out, *out.rglob("*")]} == rights
