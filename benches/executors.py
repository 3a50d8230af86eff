"""Measures a step of the denoiser with each executor that this machine has, over batch sizes and ranks.

    PYTHONPATH=tests python benches/executors.py --base demo/base [--rounds 7] [--rows 2 8] [--ranks 0 16 64]

Prints JSON: median seconds of a step and the ratio to torch's. Rank 0 is a step without factors; otherwise each guided
image (two rows) has its own LoRA in the small layout. The first round is a warm-up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import onnxruntime
import torch
from measure import alternate, machine

from scumble_build.export.command import find_base
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.families import FAMILIES
from scumble_build.graphs.inputs import StepInputs
from scumble_server.executors.onnxruntime.executor import OnnxRuntimeExecutor
from scumble_server.executors.protocol import Executor
from scumble_server.executors.torch.executor import TorchExecutor
from support.paging import some_factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("demo/base"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 16, 64])
    parser.add_argument("--side", type=int, default=16, help="height and width of the latents")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as cache:
        folder = find_base(str(arguments.base), Path(cache))
        family = FAMILIES[folder.family]
        executors: dict[str, Executor] = {
            "torch": TorchExecutor.load(folder.folder, family),
            "onnxruntime": OnnxRuntimeExecutor.load(folder.folder, family, Path(cache)),
        }
        steps = [
            measure(executors, rows, rank, arguments.side, arguments.rounds)
            for rows in arguments.rows
            for rank in arguments.ranks
        ]
    print(json.dumps({**machine(), "onnxruntime": onnxruntime.__version__, "steps": steps}, indent=1))


def measure(executors: dict[str, Executor], rows: int, rank: int, side: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    executor = executors["torch"]
    sample, timestep = torch.randn(rows, 4, side, side), torch.full((rows,), 500.0)
    width = sum(2 * kv_slice.width for kv_slice in executor.kv_slices)
    inputs = StepInputs(torch.randn(rows, 77, width), factors=factors(executor, rows, rank) if rank else None)
    runs = {
        name: (lambda executor=executor: executor.denoise(sample, timestep, inputs))
        for name, executor in executors.items()
    }
    results = {name: run() for name, run in runs.items()}
    difference = float((results["torch"] - results["onnxruntime"]).abs().max())
    seconds = alternate(runs, rounds)
    ratio = round(seconds["onnxruntime"] / seconds["torch"], 3)
    return {"rows": rows, "rank": rank, "seconds": seconds, "ratio": ratio, "difference": difference}


def factors(executor: Executor, rows: int, rank: int) -> Factors:
    """Stack factors as the server does: the two rows of a guided image share a set."""
    sets = [row // 2 for row in range(rows)]
    return some_factors(executor.step_layout, sets, rank, size=0.02, scale=1.0, rows_per_set=2)


if __name__ == "__main__":
    main()
