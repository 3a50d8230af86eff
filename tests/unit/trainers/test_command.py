"""`scumble train lora` from options to a published version."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scumble.cli import run
from scumble.errors import Incompatible, InvalidRequest, NotFound
from scumble.files import OTHERS
from scumble_registry import Registry
from scumble_trainers.base import find_base
from scumble_trainers.cli import app
from scumble_trainers.steps.loop import Run

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


def typed(*arguments: str) -> int:
    """The status of the whole command line."""
    try:
        return run([*arguments])
    except SystemExit as left:
        return int(left.code or 0)


def errors_of(*arguments: str) -> str:
    """What the command prints on stderr."""
    result = CliRunner().invoke(app, ["lora", *arguments], catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0
    return result.stderr


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


def test_the_same_command_again_is_the_same_version(base_folder: Path, make_data: Any, home: Path) -> None:
    arguments = ["--base", str(base_folder), "--data", str(make_data(4)), "--publish", "styles/flat", *SMALL]
    words = command(*arguments)
    assert home.stat().st_mode & OTHERS == 0, "a training may be the first to make it"
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
def test_one_picture_alone_warns_and_two_of_which_one_is_held_out(base_folder: Path, make_data: Any) -> None:
    arguments = ["--base", str(base_folder), "--data", str(make_data(2)), "--out", "out", *SMALL]
    assert "one picture alone (the other is held out" in errors_of(*arguments)
    assert "alone" not in errors_of(*arguments, "--validation", "0", "--fresh")
    (Path("data/metadata.jsonl")).write_text('{"file_name": "00.png", "text": "a disc"}', "utf-8")
    Path("data/01.png").unlink()
    assert "one picture alone: the adapter will repeat" in errors_of(*arguments, "--fresh")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("steps", [0, 2])
def test_ctrl_c_says_how_to_go_on(
    base_folder: Path, make_data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int
) -> None:
    train_step = Run._train_step

    def interrupt(run: Run, *rest: Any) -> float:
        if run.step == steps + 1:
            raise KeyboardInterrupt
        return train_step(run, *rest)

    out = tmp_path / "out"
    arguments = ["--base", str(base_folder), "--data", str(make_data(4)), "--out", str(out), *SMALL, "--steps", "4"]
    arguments += ["--checkpoint-every", "2", "--prompt", "a disc", "--validation", "0"]
    monkeypatch.setattr(sys, "argv", ["/bin/scumble", "train", "lora", *arguments, "--fresh"])
    monkeypatch.setattr(Run, "_train_step", interrupt)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert typed("train", "lora", *arguments, "--fresh") == 130
    told = errors.getvalue().splitlines()[-2:]
    where = f"step 2 is kept in {out}" if steps else "before the first checkpoint"
    assert where in told[0]
    assert shlex.split(told[1]) == ["scumble", "train", "lora", *arguments]

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = shlex.split(told[1])[1:]
    assert typed(*again) == 0
    assert (out / "training.json").is_file()


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


def test_bases_that_are_missing_or_of_another_kind_are_refused(base_folder: Path, tmp_path: Path, home: Path) -> None:
    with pytest.raises(NotFound, match="scumble registry import hf:OWNER/REPO --name NS/NAME"):
        find_base(str(tmp_path / "nowhere"), home)
    for name in ("without a registry", "with one that has no such name"):
        with pytest.raises(NotFound, match="scumble registry import hf:Tiny/Base --name tiny/base`") as raised:
            find_base("Tiny/Base@2", home)
        assert "scumble registry publish FOLDER --name tiny/base`" in raised.value.message, name
        Registry.open(home, create=True).close()
    with Registry.open(home) as registry:
        registry.publish(base_folder, "tiny/base")
    with pytest.raises(NotFound) as raised:
        find_base("tiny/base@2", home)
    assert "import" not in raised.value.message, "the name is there"
    with pytest.raises(Incompatible, match=r"no model_index\.json"):
        find_base(str(tmp_path), home)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(Incompatible, match="FluxPipeline"):
        find_base(str(tmp_path), home)
