"""`scumble generate` as a user types it: what it asks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scumble import generate
from scumble.cli import run
from scumble.images import Images
from scumble.receipt import Receipt
from scumble.request import Options, Request
from support.receipts import golden_receipt


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that would have been sent."""
    requests: list[Request] = []

    def draw(request: Request, _url: str | None, *, quiet: bool) -> Images:
        assert not quiet
        requests.append(request)
        return Images(np.zeros((1, 8, 8, 3), np.uint8), Receipt.parse(json.loads(golden_receipt())))

    monkeypatch.setattr(generate, "_draw", draw)
    return requests


def command(*arguments: object) -> int:
    try:
        return run(["generate", "an apple", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)


def test_options_of_the_scheduler_are_asked_for(asked: list[Request], tmp_path: Path) -> None:
    how = ["--scheduler", "tcd", "--eta", "0.3", "--timestep-spacing", "trailing", "--no-rescale-betas"]
    assert command(*how, "-o", tmp_path / "a.png") == 0
    assert command("-o", tmp_path / "b.png") == 0
    assert asked[0].scheduler == "tcd"
    assert asked[0].options == Options(eta=0.3, timestep_spacing="trailing", rescale_betas=False)
    assert asked[1].options == Options()


def test_an_option_is_the_same_by_either_way_of_asking(asked: list[Request], tmp_path: Path) -> None:
    assert command("--option", "eta=0.3", "-o", tmp_path / "a.png") == 0
    assert command("--eta", "0.3", "-o", tmp_path / "b.png") == 0
    assert asked[0] == asked[1]


@pytest.mark.parametrize("option", [("--scheduler", "magic"), ("--eta", "2"), ("--timestep-spacing", "even")])
def test_options_that_cannot_be_are_refused(asked: list[Request], tmp_path: Path, option: tuple[str, str]) -> None:
    assert command(*option, "-o", tmp_path / "a.png") == 2
    assert not asked


def test_json_and_the_receipt_file_say_what_the_server_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = json.loads(golden_receipt())

    def draw(_request: Request, _url: str | None, *, quiet: bool) -> Images:
        assert quiet
        return Images(np.zeros((1, 8, 8, 3), np.uint8), Receipt.parse(golden))

    monkeypatch.setattr(generate, "_draw", draw)
    picture, file = tmp_path / "a.png", tmp_path / "a.json"
    assert command("--json", "--receipt", file, "-o", picture) == 0
    assert capsys.readouterr().out == json.dumps({"files": [str(picture)], "receipt": golden}) + "\n"
    assert file.read_text() == json.dumps(golden, indent=2)
