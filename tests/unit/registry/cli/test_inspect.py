"""`scumble registry inspect`: what a file is, before it is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from support.commands import Scumble, as_json


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
