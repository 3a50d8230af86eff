"""Which of a run's processes this is, as torchrun and accelerate say it to each, known before torch is imported."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Return whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"
