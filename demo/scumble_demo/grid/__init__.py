"""`scumble demo`: from published files to a labelled grid, with everything real in between."""

from scumble_demo.grid.command import demo

__all__ = ["demo"]
