"""What a training leaves becomes part of the version, by `train --publish` and by `registry publish FOLDER` alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scumble.errors import Refused
from scumble_registry import Registry
from scumble_registry.results import CARD, GRID, RESULT, Result, publish_result, read_result, write_result
from support.commands import Scumble, as_json
from support.every_kind import coarse_png
from support.places import DEMO, DEMO_BASE

SAID = Result("lora.safetensors", "MIT", "an ink style", ("ink",), {"trainer": "lora", "seed": 7}, {"loss": 0.25})


@pytest.fixture
def trained(write_lora: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    folder.mkdir()
    write_lora().rename(folder / SAID.adapter)
    write_result(folder, SAID)
    (folder / CARD).write_text("# an ink style\n")
    (folder / GRID).write_bytes(coarse_png(1))
    (folder / "samples").mkdir()
    return folder


def test_a_folder_that_a_training_left_is_published_with_all_that_is_said_there(
    scumble: Scumble, trained: Path
) -> None:
    assert scumble("publish", trained, "--name", "styles/ink")[0] == 0
    shown = as_json(scumble("show", "styles/ink", "--json"))["manifest"]
    assert list(shown["files"]) == ["pytorch_lora_weights.safetensors"]
    assert (shown["license"], shown["trigger_words"]) == ("MIT", ["ink"])
    assert shown["provenance"] == {"trainer": "lora", "seed": 7}
    assert shown["metrics"] == {"loss": 0.25}
    assert shown["sample_grid"]["size"] == len((trained / GRID).read_bytes())
    assert shown["card"]["size"] == len("# an ink style\n")
    rows = scumble("show", "styles/ink")[1]
    assert "sample grid" in rows
    assert "card" in rows


def test_options_precede_what_the_result_says(scumble: Scumble, trained: Path) -> None:
    scumble("publish", trained, "--name", "styles/ink", "--license", "CC0-1.0", "--trigger", "wash")
    shown = as_json(scumble("show", "styles/ink", "--json"))["manifest"]
    assert (shown["license"], shown["trigger_words"], shown["description"]) == ("CC0-1.0", ["wash"], "an ink style")


def test_a_version_is_pulled_as_the_training_left_it_and_publishes_as_the_same(
    scumble: Scumble, trained: Path, tmp_path: Path
) -> None:
    first = as_json(scumble("publish", trained, "--name", "styles/ink", "--json"))
    assert scumble("pull", "styles/ink", "-o", tmp_path / "about", "--about")[0] == 0
    assert read_result(tmp_path / "about") == Result(
        "pytorch_lora_weights.safetensors", *(getattr(SAID, name) for name in list(Result.__slots__)[1:])
    )
    for name in (CARD, GRID):
        assert (tmp_path / "about" / name).read_bytes() == (trained / name).read_bytes()
    assert as_json(scumble("publish", tmp_path / "about", "--name", "styles/ink", "--json")) == first
    scumble("pull", "styles/ink", "-o", tmp_path / "plain")
    assert [file.name for file in (tmp_path / "plain").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_a_broken_result_is_told(scumble: Scumble, trained: Path) -> None:
    (trained / RESULT).write_text("{")
    status, _, error = scumble("publish", trained, "--name", "styles/ink")
    assert status == 4
    assert "is no JSON" in error


@pytest.mark.parametrize("adapter", ["../secret.safetensors", "gone.safetensors"])
def test_a_result_names_no_file_outside_its_folder(trained: Path, home: Path, adapter: str) -> None:
    (trained.parent / "secret.safetensors").write_bytes((trained / SAID.adapter).read_bytes())
    write_result(trained, Result(adapter, None, "", (), {}, {}))
    with Registry.open(home, create=True) as registry, pytest.raises(Refused, match="which is not in this folder"):
        publish_result(registry, trained, "styles/ink", base=None)


def test_another_programs_training_json_is_a_file_like_others(trained: Path, scumble: Scumble) -> None:
    (trained / RESULT).write_text('{"steps": 3}')
    (trained / "samples").rmdir()
    assert scumble("publish", trained, "--name", "styles/ink")[0] == 0
    assert set(as_json(scumble("show", "styles/ink", "--json"))["manifest"]["files"]) >= {RESULT, SAID.adapter}


def test_every_bundled_folder_is_published_alike(scumble: Scumble) -> None:
    folders = sorted(folder for kind in (DEMO / "adapters").iterdir() for folder in kind.iterdir())
    scumble("publish", DEMO_BASE, "--name", "scumble/demo")
    for folder in folders:
        name = f"{folder.parent.name}/{folder.name}".replace("_", "-")
        assert scumble("publish", folder, "--name", name, "--base", "scumble/demo")[0] == 0
        manifest = as_json(scumble("show", name, "--json"))["manifest"]
        assert manifest["sample_grid"]["size"] > 0
        assert manifest["provenance"]["trainer"]
    assert {folder.parent.name for folder in folders} >= {"dreambooth", "lora", "ip_adapter"}


def test_the_bundled_checkpoint_finds_its_base_by_the_content_that_it_was_trained_on(scumble: Scumble) -> None:
    digest = as_json(scumble("publish", DEMO_BASE, "--name", "scumble/demo", "--json"))["digest"]
    assert scumble("publish", DEMO / "adapters" / "dreambooth" / "tomato", "--name", "people/tomato")[0] == 0
    manifest = as_json(scumble("show", "people/tomato", "--json"))["manifest"]
    assert manifest["compatibility"]["kind"] == "dreambooth"
    assert manifest["base"] == digest != manifest["provenance"]["parent"]


def test_a_quarantined_base_is_not_found_by_its_content(scumble: Scumble) -> None:
    scumble("publish", DEMO_BASE, "--name", "scumble/demo")
    scumble("quarantine", "scumble/demo@1")
    status, _, error = scumble("publish", DEMO / "adapters" / "dreambooth" / "tomato", "--name", "people/tomato")
    assert status == 4
    assert "publish it with --base REF" in error


def test_a_difference_needs_its_base(scumble: Scumble) -> None:
    status, _, error = scumble("publish", DEMO / "adapters" / "dreambooth" / "tomato", "--name", "people/tomato")
    assert status == 4
    assert "publish it with --base REF" in error


def test_the_base_that_was_trained_on_is_found_by_its_digest(scumble: Scumble, base: Path, trained: Path) -> None:
    parent = as_json(scumble("publish", base, "--name", "tiny/base", "--json"))["digest"]
    write_result(trained, replace(SAID, provenance={"parent": parent}))
    scumble("publish", trained, "--name", "styles/ink")
    assert as_json(scumble("show", "styles/ink", "--json"))["manifest"]["base"] == parent
