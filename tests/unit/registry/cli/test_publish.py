"""`scumble registry publish`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.commands import Scumble, as_json


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


def test_a_lora_that_changes_nothing_is_told_and_published(scumble: Scumble, lora: Path) -> None:
    tensors = load_file(lora)
    zeros = {name: np.zeros_like(values) for name, values in tensors.items() if "lora_B" in name}
    told = "every change in it is zero"
    save_file(tensors | dict(list(zeros.items())[:1]), lora)
    assert told not in scumble("inspect", lora)[1]
    assert as_json(scumble("inspect", lora, "--json"))["details"]["counts"]["change nothing"] == 1
    save_file(tensors | zeros, lora)
    assert told in scumble("inspect", lora)[1]
    status, out, _ = scumble("publish", lora, "--name", "styles/zero")
    assert status == 0
    assert told in out
    assert as_json(scumble("show", "styles/zero", "--json"))["manifest"]["compatibility"]["idle"] is True


def test_a_missing_option_exits_with_2(scumble: Scumble, lora: Path) -> None:
    assert scumble("publish", lora)[0] == 2


def test_publish_says_what_was_derived(scumble: Scumble, write_lora: Callable[..., Path]) -> None:
    out = scumble("publish", write_lora(metadata={"trigger_words": "ink, wash"}), "--name", "styles/ink")[1]
    assert out.splitlines()[1:] == ["lora", "trigger words: ink, wash"]


@pytest.mark.parametrize(
    ("size", "status"), [("10", 4), ("0.1KB", 4), ("1MiB", 0), ("many", 2), ("-1", 2), ("5 ib", 2)]
)
def test_max_size_is_read_as_people_write_it(scumble: Scumble, lora: Path, size: str, status: int) -> None:
    assert scumble("publish", lora, "--name", "styles/ink", f"--max-size={size}")[0] == status
    assert scumble("inspect", lora, f"--max-size={size}")[0] == status
