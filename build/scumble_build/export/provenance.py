"""The code that exported a graph: a digest of this package, and the versions of its libraries."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import scumble_build

_LIBRARIES = ("diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")


@cache
def code_digest() -> str:
    """Return the sha256 of all modules of this package."""
    root = Path(scumble_build.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}
