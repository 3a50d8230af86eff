"""Two CPU processes train what one does, started as the documentation says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scumble_trainers.methods.lora.files import FILE

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(base: Path, data: Path, out: Path, launch: list[str], *options: str) -> dict[str, Any]:
    arguments = ["-m", "scumble_trainers", "lora", "--base", str(base), "--data", str(data), "--out", str(out)]
    arguments += ["--steps", "3", "--batch-size", "4", "--rank", "2", "--sample-steps", "1", "--prompt", "red disc"]
    arguments += ["--learning-rate", "0.001", "--save-dtype", "fp32", "--json", *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "SCUMBLE_HOME": str(out.parent)}
    done = subprocess.run(
        [sys.executable, *launch, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


@pytest.mark.parametrize("base", ["base_folder", "sdxl_folder"])
def test_two_processes_train_the_weights_of_one(
    request: pytest.FixtureRequest, make_data: Any, tmp_path: Path, base: str
) -> None:
    """SDXL with its text encoders: every process must find a gradient for every parameter."""
    folder: Path = request.getfixturevalue(base)
    xl = base == "sdxl_folder"
    data = make_data(6, (64, 64)) if xl else make_data(6)
    options = ["--text-encoder"] if xl else ["--accumulate", "2", "--ema", "0.9"]
    one = run(folder, data, tmp_path / "one", [], *options)
    two = run(folder, data, tmp_path / "two", LAUNCH, *options)

    alone, together = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "two" / FILE)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-5, rtol=0)
    assert one["metrics"]["after"] == pytest.approx(two["metrics"]["after"], abs=1e-5)
    assert one["metrics"]["after"] != one["metrics"]["before"]
