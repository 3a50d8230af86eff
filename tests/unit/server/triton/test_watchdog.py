"""Stubs end when nobody looks after them. Here a shell stands for tritonserver and a small program for its stub."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scumble_server.triton.processes import is_running
from scumble_server.triton.run_folder import OwnedRun

STUB = """
import sys, time
from pathlib import Path
from scumble_server.triton.run_folder import RunFolder
from scumble_server.triton.watchdog import Watchdog
folder = RunFolder(Path(sys.argv[1]))
watchdog = Watchdog(folder)
watchdog.is_healthy = lambda: not (folder.path / "sick").exists()
watchdog.on_stop = folder.say_drained
(folder.path / "watching").touch()
time.sleep(60)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Tree:
    """The supervisor's lock, a server, and its stub."""

    def __init__(self, home: Path) -> None:
        self.run = OwnedRun(home)
        self.folder = self.run.folder
        command = '"$0" -c "$1" "$2"; true'  # the shell stays as the parent
        self.server = subprocess.Popen(["sh", "-c", command, sys.executable, STUB, str(self.folder.path)])
        wait_until((self.folder.path / "watching").exists)
        (self.stub,) = self.folder.stubs()

    def stub_ended(self) -> bool:
        return not is_running(self.stub)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_all_is_well(tree: Tree) -> None:
    time.sleep(0.6)
    assert not tree.stub_ended()
    tree.server.kill()
    wait_until(tree.stub_ended)


def test_a_stub_ends_with_its_server(tree: Tree) -> None:
    tree.server.kill()
    tree.server.wait()
    wait_until(tree.stub_ended)


def test_a_stub_without_supervisor_ends_its_server(tree: Tree) -> None:
    tree.run._lock.close()
    assert tree.server.wait(60) == -15
    wait_until(tree.stub_ended)
    assert tree.folder.is_drained()


def test_a_sick_stub_ends(tree: Tree) -> None:
    (tree.folder.path / "sick").touch()
    wait_until(tree.stub_ended)


def test_a_stub_that_is_about_to_be_stopped_answers_first(tree: Tree) -> None:
    tree.folder.ask_to_stop()
    wait_until(tree.folder.is_drained)
    (tree.folder.path / "sick").touch()  # its loop has ended, as it should
    time.sleep(0.6)
    assert not tree.stub_ended()
    tree.server.kill()
    wait_until(tree.stub_ended)
