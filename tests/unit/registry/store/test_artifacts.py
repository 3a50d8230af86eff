from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scumble.errors import IntegrityError, InvalidRequest
from scumble_registry import Registry, Version

BaseWriter = Callable[..., Path]
KEY = {"flavour": "tensorrt", "sm": 89}


@pytest.fixture
def base(registry: Registry, write_base: BaseWriter) -> Version:
    return registry.publish(write_base(), "test/base")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(b"a plan")
    return path


def test_an_artifact_comes_back_with_its_files_key_and_provenance(
    registry: Registry, base: Version, plan: Path
) -> None:
    stored = registry.publish_artifact(base, "engine", KEY, {"engine.plan": plan}, {"seconds": 3})
    (found,) = registry.artifacts("engine", base)
    assert found == stored
    assert (found.manifest.of, found.manifest.key, found.size) == (base.digest, KEY, 6)
    assert found.manifest.provenance == {"seconds": 3}
    assert (registry.artifact_folder(found) / "engine.plan").read_bytes() == b"a plan"


def test_the_same_key_again_takes_the_place_of_the_old(registry: Registry, base: Version, plan: Path) -> None:
    old = registry.publish_artifact(base, "engine", KEY, {"engine.plan": plan})
    plan.write_bytes(b"a better plan")
    new = registry.publish_artifact(base, "engine", KEY, {"engine.plan": plan})
    assert registry.artifacts() == (new,)
    assert new.digest != old.digest


def test_other_keys_and_other_versions_stand_beside_it_newest_first(
    registry: Registry, base: Version, plan: Path, write_base: BaseWriter
) -> None:
    other = registry.publish(write_base("other", seed=1), "test/other")
    first = registry.publish_artifact(base, "engine", KEY, {"engine.plan": plan})
    second = registry.publish_artifact(base, "engine", KEY | {"sm": 120}, {"engine.plan": plan})
    third = registry.publish_artifact(other, "engine", KEY, {"engine.plan": plan})
    assert registry.artifacts() == (third, second, first)
    assert registry.artifacts("engine", base) == (second, first)
    assert registry.artifacts("graph", base) == ()


def test_a_damaged_blob_is_an_integrity_error_and_a_new_build_mends_it(
    registry: Registry, base: Version, plan: Path, home: Path
) -> None:
    artifact = registry.publish_artifact(base, "engine", KEY, {"engine.plan": plan})
    blob = artifact.manifest.files["engine.plan"]
    path = home / "registry/blobs/sha256" / blob.hex[:2] / blob.hex
    path.chmod(0o644)
    path.write_bytes(b"A plan")
    with pytest.raises(IntegrityError, match=r"engine\.plan"):
        registry.artifact_folder(artifact)
    with pytest.raises(IntegrityError, match=r"engine\.plan of engine sha256:"):
        registry.verify()
    registry.publish_artifact(base, "engine", KEY, {"engine.plan": plan})
    assert (registry.artifact_folder(artifact) / "engine.plan").read_bytes() == b"a plan"
    registry.verify()


def test_a_key_that_json_cannot_say_is_refused_and_leaves_nothing(
    registry: Registry, base: Version, plan: Path
) -> None:
    with pytest.raises(InvalidRequest):
        registry.publish_artifact(base, "engine", {"x": float("nan")}, {"engine.plan": plan})
    assert registry.artifacts() == ()
