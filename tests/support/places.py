"""Where things stand in the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "demo"
DEMO_BASE = DEMO / "base"
