"""Processes and their group, read from /proc: the server and its stubs, wherever they hang in the tree."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def is_running(pid: int) -> bool:
    """Ask whether `pid` lives; a zombie does not."""
    return _group_of(pid) is not None


def kill_group(group: int) -> None:
    """Return when no member runs any more."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while any(_group_of(int(entry.name)) == group for entry in PROC.iterdir() if entry.name.isdigit()):
        time.sleep(0.01)


def _group_of(pid: int) -> int | None:
    """Process group of a process that runs."""
    try:
        # pid (name, may hold spaces and brackets) state ppid pgrp ...
        state, _, group, *_ = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)
