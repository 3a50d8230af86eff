"""Where training keeps its downloads, checkpoints and logs."""

from __future__ import annotations

import os
from pathlib import Path


def scumble_home() -> Path:
    """`SCUMBLE_HOME`, by default `~/.scumble`."""
    return Path(os.environ.get("SCUMBLE_HOME") or Path.home() / ".scumble").expanduser()


def data_home() -> Path:
    """The trainers' own corner of it; safe to delete, it is fetched and computed again."""
    return scumble_home() / "train"
