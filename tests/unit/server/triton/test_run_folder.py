"""A lock tells the living from the dead, and the next start removes what the dead left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from scumble.errors import NotFound, Unavailable
from scumble_server.triton import run_folder
from scumble_server.triton.run_folder import OwnedRun, RunFolder, sweep


@pytest.fixture(autouse=True)
def shm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(run_folder, "SHM", folder)
    return folder


def abandon(run: OwnedRun) -> None:
    """As a SIGKILL would: the lock is gone, the files are there, and some time has passed."""
    run._lock.close()
    long_ago = time.time() - 60
    os.utime(run.folder.path, (long_ago, long_ago))


def test_its_owner_lives_until_it_lets_go(tmp_path: Path) -> None:
    run = OwnedRun(tmp_path)
    assert not run.folder.owner_is_gone()
    run.close()
    assert run.folder.owner_is_gone()
    assert not run.folder.path.exists()


def test_run_folders_and_logs_are_private(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    run = OwnedRun(home)
    folders = [home, home / "run", home / "logs", run.folder.path]
    assert {oct(folder.stat().st_mode & 0o777) for folder in folders} == {"0o700"}
    run.close()


def test_only_what_the_dead_left_is_swept(tmp_path: Path, shm: Path) -> None:
    dead, living = OwnedRun(tmp_path), OwnedRun(tmp_path)
    for run in (dead, living):
        (shm / f"{run.folder.shm_prefix}region").touch()
    (shm / "somebody-elses").touch()
    abandon(dead)
    sweep(tmp_path)
    assert not dead.folder.path.exists()
    assert living.folder.path.exists()
    assert sorted(region.name for region in shm.iterdir()) == [f"{living.folder.shm_prefix}region", "somebody-elses"]


def test_a_failure_is_told_once(tmp_path: Path) -> None:
    folder = OwnedRun(tmp_path).folder
    folder.write_failure(NotFound("no such base", ref="no/base"))
    error = folder.take_failure()
    assert isinstance(error, NotFound)
    assert error.fields == {"ref": "no/base"}
    assert folder.take_failure() is None


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    with pytest.raises(Unavailable, match="SCUMBLE_HOME"):
        OwnedRun(home)


def test_old_logs_go(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for index in range(run_folder.KEPT_LOGS + 5):
        log = logs / f"scumble_{index:02}.log"
        log.touch()
        os.utime(log, (index, index))
    sweep(tmp_path)
    assert len(list(logs.iterdir())) == run_folder.KEPT_LOGS
    assert not (logs / "scumble_00.log").exists()


def test_stubs_are_noted_and_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(OwnedRun(tmp_path).folder.path)
    folder.note_stub()
    assert folder.stubs() == [os.getpid()]
    folder.forget_stubs()
    assert folder.stubs() == []
