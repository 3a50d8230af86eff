"""Decoupled: progress and pictures as they come. See scumble_server.triton.stream_body."""

from scumble_server.triton.stream_body import TritonPythonModel

__all__ = ["TritonPythonModel"]
