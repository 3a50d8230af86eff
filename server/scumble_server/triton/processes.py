"""Reads processes and process groups from /proc: the server and its stubs, wherever they are in the process tree."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def is_running(pid: int) -> bool:
    """Return whether `pid` is running; a zombie is not."""
    return _group_of(pid) is not None


def kill_group(group: int) -> None:
    """Kill all processes of a group and wait until none is running."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while any(_group_of(int(entry.name)) == group for entry in PROC.iterdir() if entry.name.isdigit()):
        time.sleep(0.01)


def _group_of(pid: int) -> int | None:
    """Return the process group of a running process, else None."""
    try:
        # pid (name, may hold spaces and brackets) state ppid pgrp ...
        state, _, group, *_ = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)
