"""`python -m scumble_trainers METHOD …` is `scumble train METHOD …`, for launchers that start modules."""

from __future__ import annotations

import sys

from scumble.cli import run

sys.exit(run(["train", *sys.argv[1:]]))
