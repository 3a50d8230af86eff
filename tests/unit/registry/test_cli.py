"""`scumble registry …` as a user types it: output, JSON and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.commands import Scumble, as_json


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
