"""Imports Scumble from this checkout, installed or not. To be imported before it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("clients/python", "registry", "build", "server", "trainers", "tests")]
