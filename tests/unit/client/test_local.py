"""Which server `scumble generate` uses when none is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scumble import generate, local
from scumble.cli import run
from support.scripted_server import ScriptedServer

NOBODY = "127.0.0.1:1"


@pytest.fixture
def started(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The bases of the servers that were started; each is the scripted one."""
    bases: list[str | None] = []

    @contextmanager
    def local_server(base: str | None) -> Iterator[str]:
        bases.append(base)
        yield f"127.0.0.1:{server.port}"

    monkeypatch.setattr(generate, "local_server", local_server)
    monkeypatch.delenv("SCUMBLE_URL", raising=False)
    return bases


def draw(folder: Path, *more: str) -> int:
    try:
        return run(["generate", "x", "-o", str(folder / "a.png"), *more])
    except SystemExit as left:
        return int(left.code or 0)


def test_one_that_is_ready_at_the_default_address_is_used(
    started: list[str | None],
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "DEFAULT_URL", f"127.0.0.1:{server.port}")
    assert draw(tmp_path) == 0
    assert (started, len(server.requests)) == ([], 1)
    assert "starting" not in capsys.readouterr().err


@pytest.mark.parametrize("there", ["nobody", "one that is not ready"])
def test_else_one_is_started_and_that_is_said_with_how_to_avoid_it(
    started: list[str | None],
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    there: str,
) -> None:
    server.ready = False
    monkeypatch.setattr(local, "DEFAULT_URL", NOBODY if there == "nobody" else f"127.0.0.1:{server.port}")
    assert draw(tmp_path, "--base", "a/b", "--json") == 0
    told = capsys.readouterr()
    assert started == ["a/b"]
    assert "starting one" in told.err
    assert "`scumble serve`" in told.err
    assert json.loads(told.out)["files"], "what programs read is as it was"


def test_one_that_is_named_is_used_or_missed_and_none_is_started(
    started: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert draw(tmp_path, "--url", NOBODY) == 6
    monkeypatch.setenv("SCUMBLE_URL", NOBODY)
    assert draw(tmp_path) == 6
    assert started == []
