"""`scumble demo`: from published files to a labelled grid, with everything real in between."""

from scumble_server.demo.command import demo

__all__ = ["demo"]
