"""Commands that read: ls, show, find, resolve, export."""

from __future__ import annotations

from pathlib import Path

from scumble_registry import Registry
from support.commands import Scumble, as_json


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
