"""How seldom Python looks for garbage. A look at all that a server has imported and loaded holds up every thread."""

from __future__ import annotations

import gc

THRESHOLDS = 50_000, 20, 100


def collect_seldom() -> None:
    """Take what is loaded by now out of every later collection, and collect seldom. Once, when all is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
