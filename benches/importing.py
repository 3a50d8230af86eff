"""Measures publishing and first use of a file, against hashing it and against safetensors' load.

Random LoRAs of 10 MB, 300 MB and 2 GB (F16). Each measurement runs in its own process; memory is the growth beside the
mapped file, without that of Python, numpy and the registry. The file is in the page cache. Prints JSON.

    python benches/importing.py [--sizes 10 300 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from measure import machine

from scumble_registry import Registry
from scumble_registry.formats.lora import read_record
from scumble_registry.formats.safetensors_header import read_header, write_file
from scumble_registry.hashes import file_sha256

WIDTH = 1280
WAYS = ("hash", "safetensors", "publish", "first use")


def write_lora(path: Path, megabytes: int) -> None:
    """Write a LoRA in PEFT's format: rank 64, or more for a larger size, over at most 700 linear layers."""
    draw = np.random.default_rng(0)
    layers = min(700, max(1, megabytes * 1_000_000 // (2 * 2 * 64 * WIDTH)))
    rank = max(64, megabytes * 1_000_000 // (2 * 2 * WIDTH * layers))
    down = (draw.standard_normal((rank, WIDTH), np.float32) * 0.01).astype(np.float16)
    tensors = {}
    for layer in range(layers):
        module = f"unet.down_blocks.0.attentions.{layer}.transformer_blocks.0.attn1.to_q"
        tensors[f"{module}.lora_A.weight"] = np.roll(down, layer, axis=1)
        tensors[f"{module}.lora_B.weight"] = np.roll(down, -layer, axis=1).T
    write_file(path, tensors, {"format": "pt"})


def measure(way: str, file: Path, home: Path) -> dict[str, float]:
    """Measure in this process: wall-clock and CPU seconds, and peak growth of anonymous memory in MB."""
    prepared = _prepare(way, file, home)
    with _Peak() as peak:
        begin, worked = time.perf_counter(), time.process_time()
        prepared()
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    return {"seconds": seconds, "cpu": worked, "megabytes": peak.megabytes}


def _prepare(way: str, file: Path, home: Path) -> Callable[[], Any]:
    if way == "hash":
        return lambda: file_sha256(file)
    if way == "safetensors":
        from safetensors.numpy import load_file

        return lambda: load_file(file)
    registry = Registry.open(home, create=True)
    if way == "publish":
        return lambda: registry.publish(file, "b/lora")
    version = registry.resolve("b/lora")

    def use() -> None:
        for module in read_record(registry.record_path(version)).values():
            np.bitwise_or.reduce(module.down.view(np.uint16), axis=None)
            np.bitwise_or.reduce(module.up.view(np.uint16), axis=None)

    return use


class _Peak:
    """Samples this process's anonymous memory, without the mapped file, which can be dropped at any time."""

    def __enter__(self) -> Self:
        self._begin = self._most = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self._most - self._begin) / 1e6

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0


def alone(way: str, file: Path, home: Path) -> dict[str, float]:
    """Run `measure` in its own process."""
    command = [sys.executable, __file__, "--measure", way, str(file), str(home)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def compare(file: Path, rounds: int, folder: Path) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):  # the first is a warm-up
        for way in WAYS:
            taken = alone(way, file, folder / f"home{number}")
            if number:
                runs[way].append(taken)
        shutil.rmtree(folder / f"home{number}")  # saves disk space
    result: dict[str, Any] = {
        way: {
            "seconds": round(statistics.median(one["seconds"] for one in taken), 3),
            "cpu": round(statistics.median(one["cpu"] for one in taken), 3),
            "megabytes": round(max(one["megabytes"] for one in taken), 1),
        }
        for way, taken in runs.items()
    }
    for unit in ("seconds", "cpu"):
        pairs = zip(runs["publish"], runs["hash"], strict=True)
        result[f"publish / hash, {unit}"] = round(statistics.median(p[unit] / h[unit] for p, h in pairs), 2)
    largest = max(info.end - info.begin for info in read_header(file).tensors.values())
    return {"bytes": file.stat().st_size, "largest tensor": largest, **result}


def main() -> None:
    options = argparse.ArgumentParser(description="Measure publishing and first use of a file.")
    options.add_argument("--sizes", type=int, nargs="+", default=[10, 300, 2000], help="megabytes")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--measure", nargs=3, metavar=("WAY", "FILE", "HOME"))
    chosen = options.parse_args()
    if chosen.measure:
        way, file, home = chosen.measure
        print(json.dumps(measure(way, Path(file), Path(home))))
        return
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as work:
        for size in chosen.sizes:
            file = Path(work) / f"{size}.safetensors"
            write_lora(file, size)
            report[f"{size} MB"] = compare(file, chosen.rounds, Path(work))
            file.unlink()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
