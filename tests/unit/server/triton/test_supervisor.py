"""What the supervisor starts does not outlive an end at a bad moment."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scumble_server.triton.heartbeat_file import HeartbeatFile
from scumble_server.triton.run_folder import OwnedRun
from scumble_server.triton.supervisor import FIRST_PAUSE, STEADY_AFTER, Launch, Supervisor


def test_ctrl_c_while_the_process_is_being_started_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    run = OwnedRun(tmp_path)
    monkeypatch.setattr("scumble_server.triton.supervisor.subprocess.Popen", Interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    supervisor = Supervisor(Launch(["sleep", "600"], {"PATH": "/usr/bin:/bin"}, run.folder, "127.0.0.1", 9, 30))
    try:
        with pytest.raises(KeyboardInterrupt):
            supervisor.start()
        (process,) = started
        assert process.poll() == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGINT, handler)
        for process in started:
            process.kill()
        run.close()


def test_pauses_grow_with_frequent_failures_and_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = OwnedRun(tmp_path), [0.0]
    supervisor = Supervisor(Launch(["true"], {}, run.folder, "127.0.0.1", 9, 30))
    monkeypatch.setattr("scumble_server.triton.supervisor.time.monotonic", lambda: now[0])
    pauses = []
    for _ in range(10):
        now[0] += 10
        pauses.append(supervisor._next_pause())
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    now[0] += STEADY_AFTER
    assert supervisor._next_pause() == FIRST_PAUSE, "a steady server has a clean record"
    run.close()


def test_a_server_that_cannot_be_restarted_is_tried_again_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first start is taken for granted; the command fails until a file is there."""
    monkeypatch.setattr("scumble_server.triton.supervisor.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("scumble_server.triton.supervisor.LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("scumble_server.triton.supervisor.answers", lambda *_: True)
    run, cure = OwnedRun(tmp_path), tmp_path / "cured"
    command = ["sh", "-c", f"test -e {cure} && sleep 600"]
    supervisor = Supervisor(Launch(command, {"PATH": "/usr/bin:/bin"}, run.folder, "127.0.0.1", 9, 30))
    heart = HeartbeatFile(run.folder.path)
    supervisor._watcher.start()  # finds no process, so it starts one
    try:
        wait_until(lambda: len(supervisor._failures) > 8)
        assert "could not be restarted" in (supervisor.why_not_ready() or "")
        cure.touch()
        wait_until(lambda: heart.beat(0.5) or supervisor.restarts == 1)
        assert supervisor.why_not_ready() is None
        heart.forget()
        assert "not been heard of" in (supervisor.why_not_ready() or "")
    finally:
        supervisor.stop()
        run.close()
    assert supervisor.why_not_ready() == "the server is stopping"


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
