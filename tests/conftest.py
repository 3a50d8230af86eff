"""Fixtures for all tests. torch is imported by those who ask for it: most tests of the registry and client do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Tiny models are slower on many threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `StableDiffusionPipeline.from_pretrained` loads. Read only."""
    from support.tiny_sd import make_tiny_base

    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session", name="make_lora")
def _make_lora() -> Callable[..., Path]:
    from support.tiny_sd import make_lora

    return make_lora


@pytest.fixture(scope="session", name="make_tiny_base")
def _make_tiny_base() -> Callable[..., Path]:
    from support.tiny_sd import make_tiny_base

    return make_tiny_base


@pytest.fixture(scope="session")
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported graphs of all tests, of all of pytest-xdist's workers: to trace one takes seconds."""
    mine = tmp_path_factory.getbasetemp()
    folder = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "graphs"
    folder.mkdir(exist_ok=True)
    return folder
