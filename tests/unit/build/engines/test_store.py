"""Engines in the registry: which one a machine gets, and which are never loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scumble.errors import IntegrityError, Refused
from scumble_build.engines import store
from scumble_build.engines.api import Flavour
from scumble_build.engines.builder import Report
from scumble_build.engines.key import EngineKey, Machine, check_sm
from scumble_build.engines.store import StoredEngine
from scumble_build.export.manifest import GraphManifest
from scumble_registry import Registry, Version
from support.tiny_graph import make_graph

MACHINE = Machine(Flavour.TENSORRT_RTX, "1.7.1", 89)
REPORT = Report(1.0, 2.0, 3, 4, 5, {"weights_bytes": 6})


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "home", create=True) as opened:
        yield opened


@pytest.fixture
def base(registry: Registry, tiny_base: Path) -> Version:
    return registry.publish(tiny_base, "tiny/base")


def key(base: Version, **changed: object) -> EngineKey:
    ours = EngineKey(
        part="denoiser",
        graph="sha256:aa",
        base=base.digest,
        flavour=MACHINE.flavour,
        version=MACHINE.version,
        sm=(75, MACHINE.sm),
        precision="fp16",
        layout="none",
        profiles=[{"rows": [1, 2, 8]}],
        flags={"optimization_level": 3},
    )
    return replace(ours, **changed)  # type: ignore[arg-type]


def put(registry: Registry, base: Version, folder: Path, content: bytes = b"plan", **changed: object) -> StoredEngine:
    _, manifest = make_graph(folder, name=str(changed.get("part", "denoiser")))
    plan = folder / "made"
    plan.write_bytes(content)
    return store.publish(registry, base, key(base, **changed), plan, manifest, REPORT, {"host": "cpu"})


def test_what_is_published_is_found_pulled_and_has_its_report(
    registry: Registry, base: Version, tmp_path: Path
) -> None:
    stored = put(registry, base, tmp_path)
    assert store.listed(registry, base) == (stored,)
    pulled = store.pull(registry, stored)
    assert pulled.plan.read_bytes() == b"plan"
    assert pulled.manifest.graph == "denoiser"
    assert pulled.runtime_cache.parent == pulled.plan.parent
    assert stored.artifact.manifest.provenance["memory"] == {"weights_bytes": 6}
    assert stored.artifact.manifest.provenance["host"] == "cpu"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sm": (75, 120)}, "it is for SM75, SM120, not for SM89"),
        ({"version": "1.6.0"}, "its tensorrt_rtx version is 1.6.0, not 1.7.1"),
        ({"flavour": Flavour.TENSORRT}, "its flavour is tensorrt, not tensorrt_rtx"),
        ({"precision": "bf16"}, "its precision is bf16, not fp16"),
    ],
)
def test_a_foreign_engine_is_left_alone_and_the_log_says_why(
    registry: Registry,
    base: Version,
    tmp_path: Path,
    changed: dict[str, object],
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put(registry, base, tmp_path, **changed)
    with caplog.at_level(logging.INFO):
        assert store.fitting(store.listed(registry), MACHINE, base.digest, "fp16") == {}
    assert says in caplog.text


def test_an_engine_of_another_base_or_graph_is_left_alone(registry: Registry, base: Version, tmp_path: Path) -> None:
    put(registry, base, tmp_path)
    found = store.listed(registry)
    assert store.fitting(found, MACHINE, "sha256:other", "fp16") == {}
    assert store.fitting(found, MACHINE, base.digest, "fp16", {"denoiser": "sha256:bb"}) == {}
    assert set(store.fitting(found, MACHINE, base.digest, "fp16", {"denoiser": "sha256:aa"})) == {"denoiser"}


def test_of_several_that_fit_the_newest_of_each_graph_is_taken(
    registry: Registry, base: Version, tmp_path: Path
) -> None:
    put(registry, base, tmp_path, b"old")
    new = put(registry, base, tmp_path, b"new", flags={"optimization_level": 4})
    other = put(registry, base, tmp_path, part="text")
    found = store.fitting(store.listed(registry, base), MACHINE, base.digest, "fp16")
    assert found == {"denoiser": new, "text": other}


def test_the_same_key_again_takes_the_place_of_the_old(registry: Registry, base: Version, tmp_path: Path) -> None:
    put(registry, base, tmp_path, b"corrupt")
    again = put(registry, base, tmp_path, b"mended")
    assert store.listed(registry) == (again,)


def test_a_damaged_plan_is_an_integrity_error(registry: Registry, base: Version, tmp_path: Path) -> None:
    stored = put(registry, base, tmp_path)
    blob = stored.artifact.manifest.files[store.PLAN]
    path = tmp_path / "home/registry/blobs/sha256" / blob.hex[:2] / blob.hex
    path.chmod(0o644)
    path.write_bytes(b"flan")
    with pytest.raises(IntegrityError, match=r"engine\.plan"):
        store.pull(registry, stored)


def test_an_engine_of_graphs_that_this_code_no_longer_makes_is_stale(
    registry: Registry, base: Version, tmp_path: Path
) -> None:
    pulled = store.pull(registry, put(registry, base, tmp_path))
    store.check_current(pulled, "c0de")
    with pytest.raises(Refused, match="stale"):
        store.check_current(pulled, "other")


def test_a_manifest_of_another_graph_is_refused(registry: Registry, base: Version, tmp_path: Path) -> None:
    _, manifest = make_graph(tmp_path, name="text")
    (tmp_path / "plan").write_bytes(b"plan")
    stored = store.publish(registry, base, key(base), tmp_path / "plan", manifest, REPORT)
    with pytest.raises(Refused, match="is of denoiser, its manifest of text"):
        store.pull(registry, stored)


def test_an_engine_is_bound_to_the_base_that_it_was_built_of(registry: Registry, base: Version, tmp_path: Path) -> None:
    _, manifest = make_graph(tmp_path)
    with pytest.raises(Refused, match="build it again"):
        store.publish(registry, base, replace(key(base), base="sha256:other"), tmp_path / "plan", manifest, REPORT)


def test_a_key_of_another_scumble_is_left_out(registry: Registry, base: Version, tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"plan")
    registry.publish_artifact(base, store.KIND, {"part": "denoiser", "new": 1}, {store.PLAN: tmp_path / "plan"})
    assert store.listed(registry) == ()


def test_every_field_of_a_key_makes_another_engine(base: Version) -> None:
    ours = key(base)
    changes = dict.fromkeys(("part", "graph", "base", "version", "precision", "layout"), "other")
    others = [replace(ours, **{name: value}) for name, value in changes.items()]
    others += [replace(ours, sm=(90,)), replace(ours, flavour=Flavour.TENSORRT)]
    others += [replace(ours, profiles=[]), replace(ours, flags={})]
    assert len({each.digest for each in [ours, *others]}) == 11
    assert EngineKey.from_dict(ours.to_dict()) == ours


def test_a_number_that_is_no_compute_capability_is_refused() -> None:
    assert check_sm(89) == 89
    with pytest.raises(Refused, match=r"8\.9"):
        check_sm(8)


def test_a_manifest_can_be_read_back(tmp_path: Path) -> None:
    assert GraphManifest.read(make_graph(tmp_path)[1]).graph == "denoiser"
