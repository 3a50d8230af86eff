"""The folders of training's downloads, checkpoints and logs."""

from __future__ import annotations

import os
from pathlib import Path


def scumble_home() -> Path:
    """Return `SCUMBLE_HOME`, by default `~/.scumble`."""
    return Path(os.environ.get("SCUMBLE_HOME") or Path.home() / ".scumble").expanduser()


def data_home() -> Path:
    """Return the data's folder in it. It may be deleted: everything is fetched and computed again."""
    return scumble_home() / "train"
