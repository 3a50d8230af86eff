"""Processes of one group, read from /proc: the server and its stubs, wherever they hang in the tree."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def living_members(group: int) -> set[int]:
    """Process ids of `group` that run; zombies are dead."""
    members = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # pid (name, may hold spaces and brackets) state ppid pgrp …
                state, _, pgrp, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(pgrp) == group and state not in "ZX":
                    members.add(int(entry.name))
    return members


def kill_group(group: int) -> None:
    """Return when no member runs any more."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    while living_members(group):
        time.sleep(0.01)
