"""The scripts in `examples/`, as a user runs them, against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from scumble.redraw import read_receipt
from scumble_server.triton.running import RunningServer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(server: RunningServer, home: Path, script: str, *arguments: str | Path) -> list[str]:
    """Return the lines that the script prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env={**os.environ, "SCUMBLE_URL": server.grpc_url, "SCUMBLE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def pixels(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as picture:
        return np.asarray(picture)


def test_every_example_has_a_test() -> None:
    tested = {"two_adapters.py", "publish_and_use.py", "stream_previews.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == tested


def test_two_adapters(server: RunningServer, home: Path, tmp_path: Path) -> None:
    lines = run(server, home, "two_adapters.py", "--adapters", "l/a", "l/b", "--steps", "4", "--out", tmp_path)
    names = ("base", "first", "second", "both")
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / f"{name}.png") for name in names]
    assert lines[3].endswith("l/a at 0.5, l/b at 0.5")
    drawn = [pixels(tmp_path / f"{name}.png") for name in names]
    assert all(not np.array_equal(one, other) for at, one in enumerate(drawn) for other in drawn[:at])


def test_publish_and_use(
    server: RunningServer, home: Path, tiny_base: Path, make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    file = make_lora(tiny_base, tmp_path / "lora", seed=9)
    arguments = (file, "--name", "examples/new", "--base", "tiny/base", "--steps", "2", "--out", tmp_path / "a.png")
    published, drawn = run(server, home, "publish_and_use.py", *arguments)
    assert published.startswith("published examples/new@1, a lora (sha256:")
    assert drawn == f"{tmp_path / 'a.png'}: drawn with examples/new@1"
    assert read_receipt(tmp_path / "a.png").adapters[0].digest in published
    assert run(server, home, "publish_and_use.py", *arguments) == [published, drawn], "the same file, the same version"


@pytest.mark.parametrize("every", [2, 3])
def test_stream_previews(server: RunningServer, home: Path, tmp_path: Path, every: int) -> None:
    lines = run(server, home, "stream_previews.py", "--steps", "6", "--every", str(every), "--out", tmp_path)
    assert [line for line in lines if line.startswith("step")] == [f"step {step} of 6" for step in range(1, 7)]
    previews = sorted(tmp_path.glob("preview-*.png"))
    assert [f"preview: {file}" for file in previews] == [line for line in lines if line.startswith("preview")]
    assert len(previews) >= 6 // every - 1
    assert pixels(previews[0]).shape == pixels(tmp_path / "image.png").shape
    assert lines[-1] == f"done: {tmp_path / 'image.png'}"
