"""What the supervisor starts does not outlive an end at a bad moment."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scumble_server.triton.run_folder import OwnedRun
from scumble_server.triton.supervisor import Launch, Supervisor


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
