"""`scumble demo`, whole: fresh registry, real Triton, every request at once, one grid."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scumble.redraw import read_receipt

SCUMBLE = str(Path(sys.executable).with_name("scumble"))

PLAN = """
[base]
name = "scumble/demo"
path = "base"

[[publish]]
name = "styles/a"
path = "adapters/lora/a"
license = "MIT"
trigger_words = ["a style"]

[[publish]]
name = "styles/b"
path = "adapters/lora/b"

[[row]]
text = "a red apple"
style = "plain style"
seed = 1
steps = 12
scheduler = "ddim"
images.look = "look.png"

[[row]]
text = "a house"
seed = 2
steps = 16
scheduler = "dpmpp_2m"
weight = 0.5
images.look = "look.png"

[[column]]
label = "base"

[[column]]
label = "A"
prompt = "{text}, a style"
adapters = [{ ref = "styles/a" }]
shows = "look"

[[column]]
label = "B"
adapters = [{ ref = "styles/b" }]

[[column]]
label = "A + B"
adapters = [{ ref = "styles/a", weight = 0.5 }, { ref = "styles/b", weight = 0.5 }]
"""


def run_demo(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [SCUMBLE, "demo", *map(str, arguments), "--json"], capture_output=True, text=True, timeout=300, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def demo_dir(tiny_base: Path, make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo.toml").write_text(PLAN)
    (folder / "base").symlink_to(tiny_base)
    Image.new("RGB", (16, 16), "red").save(folder / "look.png")
    for seed, name in enumerate("ab", start=1):
        make_lora(tiny_base, folder / "adapters" / "lora" / name, seed=seed)
    return folder


def test_eight_requests_with_different_adapters_share_steps_and_fill_a_grid(demo_dir: Path, tmp_path: Path) -> None:
    status, report = run_demo("--demo-dir", demo_dir, "--out", tmp_path / "out")
    assert status == 0
    assert report["pictures"] == len(report["requests"]) == 8
    assert report["loop"]["requests"] == 8
    assert report["loop"]["mixed_steps"] > 0, "rows with different adapters shared a step"
    assert max(map(int, report["loop"]["batch_sizes"])) > 1
    assert report["loop"]["steps"] < 4 * (12 + 16), "batched steps, not one after another"
    assert len({cell["receipt"] for cell in report["requests"]}) == 8

    digests = {version["digest"] for version in report["versions"]}
    assert [cell["adapters"] for cell in report["requests"]] == [
        {},
        {"styles/a": 1.0},
        {"styles/b": 1.0},
        {"styles/a": 0.5, "styles/b": 0.5},
        {},
        {"styles/a": 0.5},
        {"styles/b": 0.5},
        {"styles/a": 0.25, "styles/b": 0.25},
    ]
    for cell in report["requests"]:
        receipt = read_receipt(Path(cell["file"]))
        assert receipt == read_receipt(Path(cell["file"]).with_suffix(".json")).of_image(0)
        assert {bound.digest for bound in [receipt.base, *receipt.adapters]} <= digests
    with Image.open(report["grid"]) as grid:
        assert grid.width > 4 * 256
        assert grid.height > 2 * 256
        corner = [grid.getpixel((226 + column * 268 + 20, 68 + 20)) for column in range(4)]
    assert [pixel == (255, 0, 0) for pixel in corner] == [False, True, False, False], "what A looked at is shown"


def test_missing_files_are_named(demo_dir: Path, tmp_path: Path) -> None:
    status, answer = run_demo("--demo-dir", tmp_path)
    assert (status, answer["error"]["code"]) == (3, "not_found")
    assert "--demo-dir" in answer["error"]["message"]

    (tmp_path / "demo.toml").write_text(PLAN)
    (tmp_path / "base").symlink_to(demo_dir / "base")
    status, answer = run_demo("--demo-dir", tmp_path)
    assert status == 3
    assert "styles/a" in answer["error"]["message"]


def test_a_column_asks_for_pictures_that_every_row_has(tmp_path: Path) -> None:
    (tmp_path / "demo.toml").write_text(PLAN.replace('images.look = "look.png"', "", 1))
    status, answer = run_demo("--demo-dir", tmp_path)
    assert (status, answer["error"]["code"]) == (2, "invalid_request")
    assert "'a red apple' has no picture 'look'" in answer["error"]["message"]


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.toml").write_text("[base]\nname = 3")
    status, answer = run_demo("--demo-dir", tmp_path)
    assert (status, answer["error"]["code"]) == (2, "invalid_request")
