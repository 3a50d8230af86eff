"""Sessions share what weights share; what ONNX Runtime cannot do is said. That it computes what torch does is in
`tests/contract/test_executor.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.errors import Unavailable
from scumble_build.graphs.families import FAMILIES
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.onnxruntime.sessions import check_available


def test_a_variant_runs_in_the_bases_sessions_but_for_what_it_changes(tiny_base: Path, graph_cache: Path) -> None:
    base = OnnxRuntimeExecutor.load(tiny_base, FAMILIES["sd1"], graph_cache)
    changed = {"unet": {"conv_out.weight": torch.zeros_like(base.parameter("unet.conv_out.weight"))}}
    variant = base.variant(changed)
    assert variant._sessions["text_encoder"] is base._sessions["text_encoder"]
    assert variant._sessions["vae_decoder"] is base._sessions["vae_decoder"]
    assert variant._sessions["unet.bare"] is not base._sessions["unet.bare"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="CUDAExecutionProvider"):
        check_available("cuda", "fp32")
    with pytest.raises(Unavailable, match="bfloat16"):
        check_available("cpu", "bf16")
    monkeypatch.setattr("scumble_server.executors.onnxruntime.sessions.ort", None)
    with pytest.raises(Unavailable, match="not installed"):
        check_available("cpu", "fp32")
