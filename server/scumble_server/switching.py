"""How soon Python's threads take turns."""

from __future__ import annotations

import sys

INTERVAL = 0.0005
"""Seconds (Python's own: 0.005). The loop's thread lets go of the GIL at each wait and operator of a step; one that
binds, tokenises or parses keeps it for as long as this. `benches/switching.py`: beside such a thread,
six waits of a step take 41 ms with Python's interval, 2 to 8 ms with this one, and 1.7 ms alone.
"""


def switch_often() -> None:
    """Let the threads of this process take turns every `INTERVAL`, unless it is less already."""
    sys.setswitchinterval(min(INTERVAL, sys.getswitchinterval()))
