"""What the torch executor itself decides: the precision of a VAE, and how weights lie in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scumble_build.graphs.families import FAMILIES
from scumble_server.executors import cuda
from scumble_server.executors.torch.executor import TorchExecutor
from support.tiny_families import make_tiny_sdxl

HALF = torch.float16


def vae_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    (file,) = (folder / "vae").glob("*.safetensors")
    return {"vae": load_file(file)}


def with_upcast(folder: Path, copy: Path, *, upcast: bool) -> Path:
    shutil.copytree(folder, copy)
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": upcast}))
    return copy


@pytest.mark.parametrize("bears_half", [True, False])
def test_a_checkpoints_own_vae_runs_in_the_precision_that_it_bears_not_in_the_bases(
    tmp_path: Path, *, bears_half: bool
) -> None:
    fragile = make_tiny_sdxl(tmp_path / "fragile")
    safe = with_upcast(fragile, tmp_path / "safe", upcast=False)
    base, checkpoint = (fragile, safe) if bears_half else (safe, fragile)
    executor = TorchExecutor.load(base, FAMILIES["sdxl"], precision="fp16")
    variant = executor.variant(vae_of(checkpoint), checkpoint)
    dtypes = {tensor.dtype for tensor in variant.graphs.states["vae"].values()}
    assert dtypes == {HALF if bears_half else torch.float32}
    latents = torch.randn(1, 4, 8, 8)
    expected = TorchExecutor.load(checkpoint, FAMILIES["sdxl"], precision="fp16").vae.decode(latents)
    assert torch.equal(variant.vae.decode(latents), expected)
    other = {tensor.dtype for tensor in executor.graphs.states["vae"].values()}
    assert other == {torch.float32 if bears_half else HALF}  # the base's stays as it was


def test_a_checkpoint_without_a_vae_shares_the_bases(tmp_path: Path) -> None:
    base = make_tiny_sdxl(tmp_path / "base")
    executor = TorchExecutor.load(
        with_upcast(base, tmp_path / "safe", upcast=False), FAMILIES["sdxl"], precision="fp16"
    )
    variant = executor.variant({}, base)
    pairs = zip(variant.graphs.states["vae"].values(), executor.graphs.states["vae"].values(), strict=True)
    assert all(own.data_ptr() == of_base.data_ptr() for own, of_base in pairs)


def test_channels_come_last_on_a_gpu_and_stay_on_a_cpu() -> None:
    assert cuda.memory_format("cuda:0") == torch.channels_last
    assert cuda.memory_format("cpu") == torch.preserve_format


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_cudnn_times_its_kernels_where_there_is_cudnn(
    monkeypatch: pytest.MonkeyPatch, device: str, *, expected: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cuda.choose_kernels_by_time(device)
    assert torch.backends.cudnn.benchmark is expected
