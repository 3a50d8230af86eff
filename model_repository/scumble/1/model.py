"""Plain: one response per request. See scumble_server.triton.unary_body."""

from scumble_server.triton.unary_body import TritonPythonModel

__all__ = ["TritonPythonModel"]
