"""`scumble generate` against a real server, and with one that it starts itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scumble.receipt import Receipt, receipt_digest
from scumble.redraw import read_receipt
from scumble_server.triton.running import RunningServer

SCUMBLE = str(Path(sys.executable).with_name("scumble"))


def scumble(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "SCUMBLE_URL"}
    return subprocess.run(
        [SCUMBLE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**inherited, **(env or {})},
    )


def generate(server: RunningServer, *arguments: str | Path) -> dict[str, Any]:
    done = scumble("generate", *arguments, "--url", server.grpc_url, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=np.int16)


def test_a_picture_is_written_with_its_receipt(server: RunningServer, tmp_path: Path) -> None:
    out, receipt = tmp_path / "a.png", tmp_path / "a.json"
    printed = generate(
        server,
        "a red apple",
        *("--adapter", "l/a:0.8", "--adapter", "l/b@1:-0.5", "--negative", "blurry", "--seed", "7", "--steps", "4"),
        *("--guidance", "3", "--size", "64x72", "--scheduler", "euler", "--receipt", receipt, "-o", out),
    )
    assert printed["files"] == [str(out)]
    assert pixels(out).shape == (72, 64, 3)
    written = json.loads(receipt.read_text())
    assert written == printed["receipt"]
    assert read_receipt(out).to_json() == written | {"image": 0}
    request = written["request"]
    assert (request["prompt"], request["negative_prompt"], request["seed"]) == ("a red apple", "blurry", 7)
    assert (request["steps"], request["guidance_scale"], request["scheduler"]) == (4, 3.0, "euler")
    assert [(bound["ref"], bound["weight"]) for bound in written["adapters"]] == [("l/a", 0.8), ("l/b@1", -0.5)]


def test_what_was_dropped_is_said(server: RunningServer, tmp_path: Path) -> None:
    asked = ("a cup", "--adapter", "l/a:0", "--steps", "1", "-o", tmp_path / "a.png")
    done = scumble("generate", *asked, "--url", server.grpc_url)
    assert done.returncode == 0, done.stderr
    assert "adapter l/a was dropped: weight 0" in done.stderr


def test_a_receipt_makes_the_same_picture_again(server: RunningServer, tmp_path: Path) -> None:
    first = generate(server, "a cup", "--adapter", "l/a", "--steps", "3", "-n", "3", "-o", tmp_path / "a.png")
    assert [Path(file).name for file in first["files"]] == ["a-0.png", "a-1.png", "a-2.png"]
    (tmp_path / "all.json").write_text(json.dumps(first))
    again = generate(server, "--from-receipt", tmp_path / "all.json", "-o", tmp_path / "b.png")
    one = generate(server, "--from-receipt", tmp_path / "a-1.png", "-o", tmp_path / "c.png")

    assert receipt_digest(Receipt.parse(again["receipt"])) == receipt_digest(Receipt.parse(first["receipt"]))
    for place in range(3):
        np.testing.assert_array_equal(pixels(tmp_path / f"a-{place}.png"), pixels(tmp_path / f"b-{place}.png"))
    assert np.abs(pixels(tmp_path / "a-1.png") - pixels(tmp_path / "c.png")).max() <= 1
    assert np.abs(pixels(tmp_path / "a-1.png") - pixels(tmp_path / "a-0.png")).max() > 1
    assert one["receipt"]["adapters"][0]["digest"] == first["receipt"]["adapters"][0]["digest"]


def test_an_empty_prompt_is_valid_and_files_are_printed_one_a_line(server: RunningServer, tmp_path: Path) -> None:
    done = scumble("generate", "", "--steps", "1", "-n", "2", "-o", tmp_path / "a.png", "--url", server.grpc_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert done.stderr == "", "no bar without a terminal"


@pytest.mark.parametrize(
    ("status", "code", "arguments"),
    [
        (2, "invalid_request", ["x", "--size", "65x64"]),
        (2, "invalid_request", ["x", "--size", "big"]),
        (2, "invalid_request", ["x", "--size", "99992x64"]),
        (2, "invalid_request", ["x", "--steps", "0"]),
        (2, "invalid_request", ["x", "--scheduler", "magic"]),
        (2, "invalid_request", ["x", "--adapter", "l/a:heavy"]),
        (2, "invalid_request", ["x", "--adapter", "No Reference"]),
        (2, "invalid_request", ["x", "--from-receipt", "a.json"]),
        (2, "invalid_request", []),
        (3, "not_found", ["x", "--adapter", "l/missing"]),
        (3, "not_found", ["x", "--adapter", "l/a@9"]),
        (3, "not_found", ["--from-receipt", "missing.json"]),
        (4, "refused", ["x", "--adapter", "tiny/base"]),
    ],
)
def test_bad_input_has_its_code_and_exit_status(
    server: RunningServer, tmp_path: Path, status: int, code: str, arguments: list[str]
) -> None:
    out = tmp_path / "a.png"
    done = scumble("generate", *arguments, "-o", out, "--url", server.grpc_url, "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (status, code), done.stdout
    assert not out.exists()


def test_no_server_at_the_url_exits_6_and_names_it(tmp_path: Path) -> None:
    done = scumble("generate", "x", "-o", tmp_path / "a.png", env={"SCUMBLE_URL": "127.0.0.1:1"})
    assert done.returncode == 6
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_url_a_server_is_started_and_stopped(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    out = tmp_path / "a.png"
    done = scumble("generate", "x", "--base", "tiny/base", "--steps", "2", "-o", out, env={"SCUMBLE_HOME": str(copy)})
    assert done.returncode == 0, done.stderr
    assert read_receipt(out).base.name == "tiny/base"
    assert processes_under(copy) == []


def test_ctrl_c_stops_the_server_that_it_started(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    arguments = [SCUMBLE, "generate", "x", "--base", "tiny/base", "--steps", "500", "-o", str(tmp_path / "a.png")]
    environment = {key: value for key, value in os.environ.items() if key != "SCUMBLE_URL"}
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *arguments],  # a job in a shell's background ignores it
        env={**environment, "SCUMBLE_HOME": str(copy)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not processes_under(copy) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_under(copy)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert processes_under(copy) == []


def processes_under(home: Path) -> list[int]:
    """Processes of a server that was started with this SCUMBLE_HOME: they carry it in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(home).encode() in environment and (b"tritonserver" in command or b"triton_python" in command):
            found.append(int(folder.name))
    return found
