"""Measures how a thread beside the loop stretches what the loop does, by `sys.setswitchinterval`.

    PYTHONPATH=tests python benches/switching.py [--rounds 40]

*waits*: six waits of 0.2 ms that let go of the GIL, as a step on a GPU has. *step*: a step of the tiny test base, two
rows, eager on the CPU. Beside them: nothing; Python that never waits, as what binds and tokenises; a PNG of 1024x1024
at zlib's levels 1 and 6; the same at level 1 in a process of its own, which takes a core but no GIL.

Prints JSON: median and largest milliseconds, and of the PNG alone seconds and bytes by level.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measure import machine
from PIL import Image

from scumble_build.graphs.families import FAMILIES
from scumble_build.graphs.inputs import StepInputs
from scumble_server.executors.torch.executor import TorchExecutor
from support.tiny_sd import make_tiny_base

INTERVALS = (0.005, 0.001, 0.0005, 0.0001)
SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    picture = natural_picture(SIDE)
    beside: dict[str, Callable[[], object] | None] = {
        "nothing": None,
        "python": lambda: sum(range(10_000)) and [number * 2 for number in range(10_000)],
        "png level 1": lambda: png(picture, 1),
        "png level 6": lambda: png(picture, 6),
    }
    in_process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    in_process.submit(png, picture, 1).result()
    beside["png level 1 in a process"] = lambda: in_process.submit(png, picture, 1).result()
    loops = {"waits": six_waits, "step": one_step()}
    rows = [
        {"interval_ms": interval * 1e3, "loop": loop, "beside": name, **measure(run, other, interval, arguments.rounds)}
        for interval in INTERVALS
        for loop, run in loops.items()
        for name, other in beside.items()
    ]
    in_process.shutdown()
    print(json.dumps({**machine(), "png": levels(picture), "stretch": rows}, indent=1))


def measure(
    run: Callable[[], object], other: Callable[[], object] | None, interval: float, rounds: int
) -> dict[str, float]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        with busy(other):
            run()
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
    finally:
        sys.setswitchinterval(before)
    return {"median_ms": round(statistics.median(seconds) * 1e3, 2), "largest_ms": round(max(seconds) * 1e3, 2)}


@contextmanager
def busy(work: Callable[[], object] | None) -> Iterator[None]:
    """Do `work` again and again in another thread."""
    ended = threading.Event()

    def repeat() -> None:
        while work is not None and not ended.is_set():
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def six_waits() -> None:
    for _ in range(6):
        time.sleep(0.0002)


def one_step() -> Callable[[], object]:
    with tempfile.TemporaryDirectory() as folder:
        executor = TorchExecutor.load(make_tiny_base(Path(folder) / "base"), FAMILIES["sd1"])
    width = sum(2 * kv_slice.width for kv_slice in executor.kv_slices)
    sample, timestep, inputs = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), StepInputs(torch.randn(2, 77, width))
    return lambda: executor.denoise(sample, timestep, inputs)


def natural_picture(side: int) -> Image.Image:
    """Make noise of all scales, the coarse ones strongest, as in photographs."""
    generator, sum_of_all, size = np.random.default_rng(0), np.zeros((side, side, 3)), 4
    while size <= side:
        noise = Image.fromarray((generator.random((size, size, 3)) * 255).astype(np.uint8))
        sum_of_all += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), float) / size**0.9
        size *= 2
    low, high = sum_of_all.min(), sum_of_all.max()
    return Image.fromarray(((sum_of_all - low) / (high - low) * 255).astype(np.uint8))


def png(picture: Image.Image, level: int) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def levels(picture: Image.Image) -> dict[int, dict[str, float]]:
    results = {}
    for level in (0, 1, 2, 4, 6, 9):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            size = len(png(picture, level))
            seconds.append(time.perf_counter() - start)
        results[level] = {"seconds": round(statistics.median(seconds), 3), "bytes": size}
    return results


if __name__ == "__main__":
    main()
