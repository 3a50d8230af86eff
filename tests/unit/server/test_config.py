"""What a server is started with: what may be left out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import InvalidRequest
from scumble_server.config import ServerConfig


def test_the_environment_names_the_executor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCUMBLE_EXECUTOR", "onnxruntime")
    assert ServerConfig(home=tmp_path, base="a/b").executor == "onnxruntime"
    monkeypatch.setenv("SCUMBLE_EXECUTOR", "tvm")
    with pytest.raises(InvalidRequest, match="torch, onnxruntime"):
        ServerConfig(home=tmp_path, base="a/b")
