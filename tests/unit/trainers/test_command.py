"""`scumble train lora` from options to a published version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scumble.errors import Incompatible, InvalidRequest, NotFound
from scumble_registry import Registry
from scumble_trainers.base import find_base
from scumble_trainers.cli import app

SMALL = ["--steps", "2", "--batch-size", "2", "--rank", "2", "--sample-steps", "1", "--learning-rate", "0.01"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCUMBLE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # no folder here may be taken for a reference
    return tmp_path / "home"


def command(*arguments: str) -> str:
    """What the command prints; its errors are raised."""
    result = CliRunner().invoke(app, ["lora", *arguments], catch_exceptions=False, standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.stdout


def test_it_trains_for_a_base_in_the_registry_and_publishes(base_folder: Path, make_data: Any, home: Path) -> None:
    with Registry.open(home, create=True) as registry:
        base = registry.publish(base_folder, "tiny/base")
    data = str(make_data(4))
    arguments = ["--base", "tiny/base@1", "--data", data, "--publish", "styles/flat", "--alias", "staging", *SMALL]

    told = json.loads(command(*arguments, "--trigger", "flat style", "--license", "MIT", "--seed", "3", "--json"))

    with Registry.open(home) as registry:
        version = registry.resolve("styles/flat@staging")
        assert (version.ref, version.digest) == (told["ref"], told["digest"])
        assert registry.sample_grid_path(version) is not None
    manifest = version.manifest
    assert (manifest.kind, manifest.base) == ("lora", base.digest)
    assert (manifest.license, manifest.trigger_words) == ("MIT", ("flat style",))
    told_of = manifest.provenance
    assert (told_of["trainer"], told_of["seed"], told_of["parent"]) == ("lora", 3, base.digest)
    assert str(told_of["data_digest"]).startswith("sha256:")
    assert {"config", "libraries", "time", "peak_memory", "device"} <= told_of.keys()
    assert {"before", "after"} <= manifest.metrics.keys()
    assert "validation_loss" in str(manifest.metrics["after"])


@pytest.mark.usefixtures("home")
def test_the_same_command_again_is_the_same_version(base_folder: Path, make_data: Any) -> None:
    arguments = ["--base", str(base_folder), "--data", str(make_data(4)), "--publish", "styles/flat", *SMALL]
    words = command(*arguments)
    again = command(*arguments)
    assert "published as styles/flat@1 (sha256:" in words
    assert words == again


def test_a_folder_that_the_registry_holds_is_known_by_its_reference(base_folder: Path, home: Path) -> None:
    assert find_base(str(base_folder), home).ref is None
    with Registry.open(home, create=True) as registry:
        version = registry.publish(base_folder, "tiny/base")
    found = find_base(str(base_folder), home)
    assert (found.ref, found.digest) == ("tiny/base@1", version.digest)
    assert find_base("tiny/base", home).content == found.content


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--rank", "0"], "--rank 0"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--caption-dropout", "2"], "--caption-dropout"),
        (["--publish", "no-name"], "no-name"),
        (["--publish", "a/b", "--alias", "7"], "alias"),
        (["--alias", "prod", "--out", "x"], "--publish"),
        ([], "--publish ns/name, --out FOLDER"),
    ],
)
def test_bad_options_are_named(base_folder: Path, tmp_path: Path, options: list[str], error: str) -> None:
    arguments = ["--base", str(base_folder), "--data", str(tmp_path), "--steps", "2"]
    with pytest.raises(InvalidRequest, match=error):
        command(*arguments, *options)


def test_bases_that_are_missing_or_of_another_kind_are_refused(tmp_path: Path, home: Path) -> None:
    with pytest.raises(NotFound):
        find_base(str(tmp_path / "nowhere"), home)
    with pytest.raises(NotFound):
        find_base("tiny/base", home)
    with pytest.raises(Incompatible, match=r"no model_index\.json"):
        find_base(str(tmp_path), home)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(Incompatible, match="FluxPipeline"):
        find_base(str(tmp_path), home)
