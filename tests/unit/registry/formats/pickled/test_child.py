"""The process that reads a pickle may do nothing but that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESTRICTED = """
import os, socket
from scumble_registry.formats.pickled.child import _restrict
_restrict(1 << 30, 2, 1000)
def fails(action):
    try:
        action()
    except (OSError, MemoryError) as error:
        return type(error).__name__
for action in (lambda: open("/etc/passwd"), lambda: open("new", "w"), socket.socket, lambda: bytearray(1 << 31)):
    print(fails(action), flush=True)
while True:
    pass
"""


def test_the_reader_can_open_nothing_and_take_no_more_than_it_may(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RESTRICTED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["OSError", "OSError", "OSError", "MemoryError"], done.stderr
    assert done.returncode < 0  # its time was up
