"""One service over tiny bases of three families, and diffusers' pipelines of the same folders as oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble_registry import Registry
from support.lora_bench import Bench
from support.tiny_families import make_tiny_inpainting, make_tiny_sd2, make_tiny_sdxl


@pytest.fixture(scope="package")
def bench(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any], diffusers_alone: Any
) -> Iterator[Bench]:
    home, files = tmp_path_factory.mktemp("formats"), tmp_path_factory.mktemp("files")
    folders = {"sd1": tiny_base, "sd2": make_tiny_sd2(files / "sd2"), "sdxl": make_tiny_sdxl(files / "sdxl")}
    folders["inpainting"] = make_tiny_inpainting(tiny_base, files / "inpainting")
    with Registry.open(home, create=True) as registry:
        for name, folder in folders.items():
            registry.publish(folder, name=f"base/{name}")
    running = start(home, "base/sd1", {}, more_bases=("base/sd2", "base/sdxl", "base/inpainting"))
    yield Bench(running, folders, diffusers_alone)
    running.service.close()


@pytest.fixture
def inpainting(bench: Bench) -> Path:
    return bench.folders["inpainting"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
