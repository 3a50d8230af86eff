"""`scumble demo`: publishes the bundled files, serves them and draws a labelled grid."""

from scumble_demo.grid.command import demo

__all__ = ["demo"]
