"""Commands that read: ls, show, find, resolve, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scumble_registry import Registry
from support.commands import Scumble, as_json

BaseWriter = Callable[..., Path]
LoraWriter = Callable[..., Path]


def test_people_read_tables_and_notes(scumble: Scumble, lora: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink", "--alias", "prod", "--description", "[red]ink[/red]")
    assert "styles/ink@1" in scumble("ls")[1]
    assert "prod" in scumble("ls", "styles/ink")[1]
    assert "[red]ink[/red]" in scumble("show", "styles/ink")[1]
    assert "all as published" in scumble("verify")[1]
    scumble("deprecate", "styles/ink@1")
    status, out, err = scumble("resolve", "styles/ink@1")
    assert (status, err) == (0, "note: styles/ink@1 is deprecated\n")
    assert out.startswith("styles/ink@1 sha256:")


def test_what_people_copy_is_whole_however_narrow_the_terminal(
    scumble: Scumble, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References, digests and file names, on lines of their own: not cut and not broken at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    long = f"{'n' * 60}/{'a' * 60}"
    scumble("publish", base, "--name", "demo/base")
    word = "a word that is long enough to take a good part of a line"
    version = as_json(scumble("publish", lora, "--name", long, "--base", "demo/base", "--trigger", word, "--json"))
    (line,) = [line for line in scumble("ls")[1].splitlines() if long in line]
    assert f"{long}@1" in line
    assert "demo/base@1" in line
    assert word in line
    shown = scumble("show", long)[1].splitlines()
    for whole in (f"{long}@1", version["digest"], "lora_weights.safetensors", word):
        assert any(line.endswith(whole) for line in shown), whole
    hashes = as_json(scumble("show", long, "--json"))
    assert any(line.endswith(hashes["record"]) for line in shown)
    assert any(
        line.endswith(hashes["record"].removeprefix("sha256:"))
        for line in scumble("find", hashes["record"])[1].splitlines()
    )
    assert not any(line != line.rstrip() for line in shown)


@pytest.fixture
def several(scumble: Scumble, base: Path, write_base: BaseWriter, write_lora: LoraWriter) -> Scumble:
    """Two bases and three LoRAs, one of which has two versions."""
    scumble("publish", base, "--name", "demo/base")
    scumble("publish", write_base("other", seed=1), "--name", "demo/other")
    ink = ("--name", "styles/ink", "--license", "MIT", "--trigger", "Ink Style")
    scumble("publish", write_lora("1.safetensors", seed=1), *ink, "--base", "demo/base", "--alias", "prod")
    scumble("publish", write_lora("2.safetensors", seed=2), *ink, "--base", "demo/other")
    scumble("publish", write_lora("3.safetensors", seed=3), "--name", "styles/oil", "--license", "CC0-1.0", "--staged")
    return scumble


def test_ls_shows_what_tells_versions_apart(several: Scumble) -> None:
    listed = {line.split()[0]: line for line in several("ls")[1].splitlines()}
    for word in ("lora", "demo/other@1", "Ink Style", "MIT", "approved", "prod → 1"):
        assert word in listed["styles/ink@2"], word
    assert "styles/ink@1" not in listed, "an older version, without an option that asks for it"
    assert "staged" in listed["styles/oil@1"]


@pytest.mark.parametrize(
    ("options", "refs"),
    [
        (["--kind", "base"], ["demo/base@1", "demo/other@1"]),
        (["--base", "demo/base"], ["styles/ink@1"]),
        (["--base", "demo/other@1"], ["styles/ink@2"]),
        (["--trigger", "ink st"], ["styles/ink@1", "styles/ink@2"]),
        (["--license", "mit"], ["styles/ink@1", "styles/ink@2"]),
        (["--status", "staged"], ["styles/oil@1"]),
        (["--alias", "prod"], ["styles/ink@1"]),
        (["--license", "mit", "--base", "demo/other"], ["styles/ink@2"]),
        (["styles/oil", "--license", "mit"], []),
        (["--base", "sha256:" + "0" * 64], []),
    ],
)
def test_ls_lists_what_the_options_ask_for(several: Scumble, options: list[str], refs: list[str]) -> None:
    entries = as_json(several("ls", *options, "--json"))
    assert [entry["ref"] for entry in entries] == refs
    printed = several("ls", *options)[1]
    assert [line.split()[0] for line in printed.splitlines()[1:]] == refs
    assert refs or printed == "No version is like that.\n"


def test_ls_tells_programs_the_same(several: Scumble) -> None:
    entry = as_json(several("ls", "styles/ink", "--json"))[0]
    base = as_json(several("resolve", "demo/base", "--json"))["digest"]
    told = {key: entry[key] for key in ("kind", "base", "base_ref", "trigger_words", "license", "status", "aliases")}
    assert told == {
        "kind": "lora",
        "base": base,
        "base_ref": "demo/base@1",
        "trigger_words": ["Ink Style"],
        "license": "MIT",
        "status": "approved",
        "aliases": ["prod"],
    }


def test_ls_refuses_what_no_version_can_be(several: Scumble) -> None:
    assert (several("ls", "--kind", "lorra")[0], several("ls", "--status", "good")[0]) == (2, 2)
    assert several("ls", "--base", "demo/none")[0] == 3


def test_quarantining_what_an_alias_points_at_warns_and_names_it(several: Scumble) -> None:
    assert several("quarantine", "styles/oil@1")[2] == ""
    status, out, err = several("quarantine", "styles/ink@1")
    assert (status, out) == (0, "styles/ink@1 is now quarantined\n")
    assert err.startswith("warning: styles/ink@prod points at styles/ink@1, so requests for it are refused")
    assert several("approve", "styles/ink@1")[2] == ""
    several("alias", "styles/ink", "best", "1")
    assert "styles/ink@best and styles/ink@prod point at" in several("quarantine", "styles/ink@1")[2]
    assert as_json(several("quarantine", "styles/ink@1", "--json"))["aliases"] == ["best", "prod"]


def test_an_empty_registry_says_so(scumble: Scumble, home: Path) -> None:
    Registry.open(home, create=True).close()
    assert "Nothing is published yet" in scumble("ls")[1]
    assert as_json(scumble("ls", "--json")) == []


def test_a_registry_that_is_missing_exits_with_3(scumble: Scumble, home: Path) -> None:
    assert scumble("ls")[0] == 3
    assert not home.exists()


def test_find_tells_versions_by_hash(scumble: Scumble, lora: Path) -> None:
    version = as_json(scumble("publish", lora, "--name", "styles/ink", "--json"))
    shown = as_json(scumble("show", "styles/ink", "--json"))
    assert shown["record"] == shown["manifest"]["record"]["digest"]
    for hash_ in (shown["hashes"]["autov2"], shown["hashes"]["autov3"], shown["record"], version["digest"]):
        (found,) = as_json(scumble("find", hash_, "--json"))
        assert (found["ref"], found["status"]) == ("styles/ink@1", "approved")
    assert "styles/ink@1" in scumble("find", shown["hashes"]["autov2"])[1]
    assert scumble("find", "0" * 10)[0] == 3
    assert scumble("find", "short")[0] == 2


def test_export_writes_what_other_tools_read(scumble: Scumble, lora: Path, tmp_path: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    assert (
        as_json(scumble("export", "styles/ink", "--layout", "peft", "-o", tmp_path / "out", "--json"))["version"] == 1
    )
    assert list((tmp_path / "out").rglob("adapter_config.json"))
    status, _, said = scumble("export", "styles/ink", "--layout", "onnx", "-o", tmp_path / "more")
    assert (status, "diffusers or kohya or peft or webui" in said) == (2, True)
