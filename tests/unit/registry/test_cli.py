"""`scumble registry …` as a user types it: output, JSON and exit status."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.cli import run
from scumble_registry import Registry
from scumble_registry.store.blobs import FileStore
from support.stand_ins import Hub, serving

Scumble = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scumble(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scumble:
    """`status, stdout, stderr = scumble("ls", "--json")`, with SCUMBLE_HOME set and a wide terminal."""
    monkeypatch.setenv("SCUMBLE_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        try:
            status = run(["registry", *map(str, arguments)])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def as_json(output: tuple[int, str, str]) -> Any:
    status, out, _ = output
    assert status == 0
    return json.loads(out)


def test_the_whole_story_in_commands(scumble: Scumble, base: Path, lora: Path, tmp_path: Path) -> None:
    assert scumble("publish", base, "--name", "demo/base")[0] == 0
    publish = ("publish", lora, "--name", "styles/ink", "--base", "demo/base", "--alias", "prod")
    version = as_json(scumble(*publish, "--license", "MIT", "--trigger", "ink", "--trigger", "wash", "--json"))
    assert (version["ref"], version["status"], version["kind"]) == ("styles/ink@1", "approved", "lora")
    assert as_json(scumble("resolve", "styles/ink@prod", "--json"))["digest"] == version["digest"]
    shown = as_json(scumble("show", "styles/ink", "--json"))
    assert shown["aliases"] == ["prod"]
    assert (shown["manifest"]["license"], shown["manifest"]["trigger_words"]) == ("MIT", ["ink", "wash"])
    assert [entry["ref"] for entry in as_json(scumble("ls", "--json"))] == ["demo/base@1", "styles/ink@1"]
    assert as_json(scumble("pull", "styles/ink", "-o", tmp_path / "out", "--json"))["version"] == 1
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert as_json(scumble("alias", "styles/ink", "beta", "1", "--json"))["ref"] == "styles/ink@1"
    assert as_json(scumble("deprecate", "styles/ink@1", "--json"))["status"] == "deprecated"
    assert as_json(scumble("verify", "--json"))["versions"] == 2
    assert as_json(scumble("quarantine", "styles/ink@1", "--json"))["status"] == "quarantined"
    assert scumble("resolve", "styles/ink@1")[0] == 4
    assert as_json(scumble("approve", "styles/ink@1", "--json"))["status"] == "approved"


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


def test_sampling_is_published_from_json_or_a_file_and_shown(scumble: Scumble, lora: Path, tmp_path: Path) -> None:
    said = '{"scheduler": "lcm", "steps": 4}'
    (tmp_path / "sampling.json").write_text(said)
    typed = as_json(scumble("publish", lora, "--name", "a/lcm", "--sampling", said, "--json"))
    read = as_json(scumble("publish", lora, "--name", "b/lcm", "--sampling", tmp_path / "sampling.json", "--json"))
    assert typed["digest"] == read["digest"]
    assert as_json(scumble("show", "a/lcm", "--json"))["manifest"]["sampling"] == json.loads(said)
    assert '{"scheduler":"lcm","steps":4}' in scumble("show", "a/lcm")[1]


@pytest.mark.parametrize(
    ("sampling", "status"), [('{"steps": 0}', 2), ("{steps}", 2), ("[1]", 3), ("/nowhere.json", 3), ('{"eta": 1}', 2)]
)
def test_sampling_that_cannot_be_read_is_refused(scumble: Scumble, lora: Path, sampling: str, status: int) -> None:
    assert scumble("publish", lora, "--name", "a/lcm", "--sampling", sampling)[0] == status


def test_a_base_has_no_sampling(scumble: Scumble, base: Path) -> None:
    status, _, said = scumble("publish", base, "--name", "demo/base", "--sampling", '{"steps": 4}')
    assert (status, "scumble.json" in said) == (2, True)


def test_an_empty_registry_says_so(scumble: Scumble, home: Path) -> None:
    Registry.open(home, create=True).close()
    assert "Nothing is published yet" in scumble("ls")[1]
    assert as_json(scumble("ls", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (["resolve", "ink"], 2, "invalid_request"),
        (["alias", "styles/ink", "7", "1"], 2, "invalid_request"),
        (["alias", "styles/ink", "prod", "one"], 2, "invalid_request"),
        (["quarantine", "styles/ink"], 2, "invalid_request"),
        (["ls", "ink"], 2, "invalid_request"),
        (["ls", "styles/oil"], 3, "not_found"),
        (["show", "styles/ink@2"], 3, "not_found"),
        (["publish", "/nowhere", "--name", "styles/ink"], 3, "not_found"),
        (["publish", "/dev/null", "--name", "styles/ink"], 4, "refused"),
    ],
)
def test_each_error_has_its_exit_status_and_code(
    scumble: Scumble, lora: Path, arguments: list[str], expected: int, code: str
) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    status, out, err = scumble(*arguments, "--json")
    assert (status, json.loads(out)["error"]["code"], err) == (expected, code, "")
    status, out, err = scumble(*arguments)
    assert (status, out) == (expected, "")
    assert err.startswith("scumble: ")


def test_a_registry_that_is_missing_exits_with_3(scumble: Scumble, home: Path) -> None:
    assert scumble("ls")[0] == 3
    assert not home.exists()


def test_damage_exits_with_5_and_names_what_is_damaged(scumble: Scumble, home: Path, lora: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    with Registry.open(home) as registry:
        record = registry.resolve("styles/ink").manifest.record
    assert record is not None
    path = FileStore(home / "registry").path(record)
    path.unlink()
    path.write_bytes(b"damage")
    status, _, err = scumble("verify")
    assert (status, "(record) of styles/ink@1" in err) == (5, True)


def test_a_missing_option_exits_with_2(scumble: Scumble, lora: Path) -> None:
    assert scumble("publish", lora)[0] == 2


def test_inspect_says_as_json_what_it_is_and_whether_it_fits(
    scumble: Scumble, home: Path, base: Path, write_lora: Callable[..., Path]
) -> None:
    told = as_json(scumble("inspect", write_lora(metadata={"ss_epoch": "3"}), "--base", base, "--json"))
    assert (told["kind"], told["base"]["fits"], told["training"], told["published"]) == (
        "lora",
        True,
        {"ss_epoch": "3"},
        [],
    )
    assert not home.exists()


def test_inspect_exits_with_4_where_publishing_would(
    scumble: Scumble, write_base: Callable[..., Path], write_lora: Callable[..., Path]
) -> None:
    wide = {f"unet.other.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}
    status, out, _ = scumble("inspect", write_lora(tensors=wide), "--base", write_base(), "--json")
    assert (status, json.loads(out)["base"]["fits"]) == (4, False)
    assert "unet.other" in json.loads(out)["base"]["why_not"]


def test_people_see_no_escape_sequence_and_no_markup_of_a_file(
    scumble: Scumble, write_lora: Callable[..., Path]
) -> None:
    evil = "\x1b[2J[red]ink[/red][link=http://x]\u202e" + "x" * 5000
    file = write_lora(metadata={"ss_output_name": evil, "ss_\x1b[31m": "a", "trigger_words": "[bold]ink"})
    status, out, _ = scumble("inspect", file)
    assert status == 0
    assert "\x1b" not in out and "\u202e" not in out and len(out) < 3000
    assert "[red]ink[/red]" in out
    scumble("publish", file, "--name", "styles/ink")
    assert "\x1b" not in scumble("show", "styles/ink")[1]


def test_publish_says_what_was_derived(scumble: Scumble, write_lora: Callable[..., Path]) -> None:
    out = scumble("publish", write_lora(metadata={"trigger_words": "ink, wash"}), "--name", "styles/ink")[1]
    assert out.splitlines()[1:] == ["lora", "trigger words: ink, wash"]


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


@pytest.mark.parametrize(
    ("size", "status"), [("10", 4), ("0.1KB", 4), ("1MiB", 0), ("many", 2), ("-1", 2), ("5 ib", 2)]
)
def test_max_size_is_read_as_people_write_it(scumble: Scumble, lora: Path, size: str, status: int) -> None:
    assert scumble("publish", lora, "--name", "styles/ink", f"--max-size={size}")[0] == status
    assert scumble("inspect", lora, f"--max-size={size}")[0] == status


def test_import_takes_what_publish_takes(
    scumble: Scumble, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"ink.safetensors": lora.read_bytes()}, lfs={"ink.safetensors"})
    scumble("publish", base, "--name", "demo/base")
    options = ("--name", "styles/ink", "--base", "demo/base", "--trigger", "ink", "--alias", "prod", "--staged")
    with serving(hub) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        version = as_json(scumble("import", "hf:ann/ink", *options, "--json"))
        assert scumble("import", "hf:ann/ink", "--name", "styles/oil", "--max-size", "10")[0] == 4
        assert scumble("import", "hf:ann/oil", "--name", "styles/oil")[0] == 3
    assert (version["ref"], version["status"]) == ("styles/ink@1", "staged")
    shown = as_json(scumble("show", "styles/ink@prod", "--json"))["manifest"]
    assert shown["provenance"]["source"]["commit"] == hub.commit
    assert shown["base"]
    assert scumble("import", "http://example.org/a", "--name", "styles/oil")[0] == 2
    assert scumble("import", "https://127.0.0.1:9/a", "--name", "styles/oil")[0] == 4


def test_gc_and_fsck_say_what_they_found(scumble: Scumble, home: Path, lora: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    FileStore(home / "registry").put(io.BytesIO(b"left behind"))
    assert as_json(scumble("fsck", "--json"))["unneeded"] == 1
    assert "1 unneeded blobs" in scumble("fsck")[1]
    assert as_json(scumble("gc", "--grace", "0", "--dry-run", "--json"))["blobs"] == 1
    assert scumble("gc", "--grace", "0")[1].startswith("1 blobs, 0 entries of the cache, 0 unfinished: 11 bytes freed")
    assert "complete\n" in scumble("fsck")[1]
    for file in (home / "registry/blobs/sha256").glob("??/*"):
        file.unlink()
    status, out, _ = scumble("fsck", "--json")
    assert (status, len(json.loads(out)["error"]["fields"]["damaged"])) == (5, 2)


def test_export_writes_what_other_tools_read(scumble: Scumble, lora: Path, tmp_path: Path) -> None:
    scumble("publish", lora, "--name", "styles/ink")
    assert (
        as_json(scumble("export", "styles/ink", "--layout", "peft", "-o", tmp_path / "out", "--json"))["version"] == 1
    )
    assert list((tmp_path / "out").rglob("adapter_config.json"))
    status, _, said = scumble("export", "styles/ink", "--layout", "onnx", "-o", tmp_path / "more")
    assert (status, "diffusers or kohya or peft or webui" in said) == (2, True)
