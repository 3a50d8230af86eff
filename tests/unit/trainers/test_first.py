"""What is wrong with options, base and data is told before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PLAIN = ["--base", "BASE", "--data", "DATA", "--out", "out", "--steps", "2"]

CODE = """
import sys
from scumble.cli import run
status = run(sys.argv[1:])
print(status, [name for name in ("torch", "diffusers", "transformers", "accelerate") if name in sys.modules])
"""


def run_train(folder: Path, base: Path, *arguments: str) -> tuple[str, str]:
    """Return what a process of `scumble train` says last on stdout (its status, what it imported), and on stderr."""
    given = [{"BASE": str(base), "DATA": str(folder / "data")}.get(argument, argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", CODE, "train", *given], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip().splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["lora", *PLAIN], 3, "no metadata.jsonl and no pictures"),
        (["lora", *PLAIN, "--resolution", "17"], 2, "--resolution 17"),
        (["lora", "--base", "no/base", *PLAIN[2:]], 3, "no/base"),
    ],
)
def test_a_bad_folder_or_base(
    base_folder: Path, tmp_path: Path, arguments: list[str], status: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCUMBLE_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    last, errors = run_train(tmp_path, base_folder, *arguments)
    assert last == f"{status} []"
    assert told in errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lora", *PLAIN, "--trigger", "a word"], "'a word'"),
        (["textual-inversion", *PLAIN, "--token", "<x>"], "no caption with <x>"),
        (["controlnet", *PLAIN, "--preprocessor", "none"], '"conditioning_image"'),
        (["hypernetwork", *PLAIN, "--width", "10", "--heads", "4"], "--width 10"),
        (["dreambooth", *PLAIN, "--class-prompt", "x", "--bucket"], "--bucket"),
    ],
)
def test_data_that_a_method_cannot_use(
    base_folder: Path, make_data: Callable[[int], Path], tmp_path: Path, arguments: list[str], told: str
) -> None:
    make_data(3)
    last, errors = run_train(tmp_path, base_folder, *arguments)
    assert last == "2 []"
    assert told in errors
