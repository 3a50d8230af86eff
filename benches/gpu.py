"""Benchmarks for a machine with a GPU: at most ten minutes, no network, random weights. Prints JSON.

    python benches/gpu.py                 SD 1.5 at 512² and SDXL at 1024² on CUDA
    python benches/gpu.py --engines       on TensorRT too
    python benches/gpu.py --tiny          the same script on a CPU with toy sizes, to test that it works

Scumble need not be installed, only what it imports. Each section's result is told on stderr as it comes. `floor_s` is
what the arithmetic or the bytes would take at the rates that this device reaches (`rates`). It measures the following;
`aims` in the output compares each figure with a threshold:

* every kind of request, drawn by a real Service on the device, against one on the CPU
* correctness: a mixed step in the serving precision against fp32 on the CPU
* bare: our graph without adapters against diffusers' own UNet
* mixed: 8 rows with 8 sets of LoRAs against 8 bare rows, and against the added arithmetic of the factors
* switch: a set joins a batch from the device (warm) or from host memory (cold)
* checkpoint: another checkpoint's UNet from host memory, until its first step may start
* traffic: images with different adapters, drawn by Scumble in one batch; by diffusers with PEFT one after another, by
  diffusers compiled with hot-swapped LoRAs, and in one batch with one shared LoRA, which is the limit
* exported (with `--engines`, which builds them first and takes longer): steps on Scumble's engines against an engine of
  diffusers' UNet exported as it is, and the overhead of a graph with factors for a batch without any
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - first
import exported
import torch
from gpu_aims import RANKS, aims, aims_of_kinds
from gpu_baselines import Diffusers
from gpu_floors import Rates, measure_rates
from gpu_plans import Plan, real_plan, tiny_plan
from gpu_service import every_kind
from measure import count_flops, machine
from torch import Tensor

from scumble_build.export.manifest import Precision
from scumble_build.graphs.families import FAMILIES as OURS
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.layout import PAGE, pages_for
from scumble_build.graphs.models import Models
from scumble_server.denoise import stacking
from scumble_server.denoise.phase import Phase
from scumble_server.executors.cuda import own_stream
from scumble_server.executors.device import Stepping
from scumble_server.executors.torch.executor import TorchExecutor
from scumble_server.factors.bound_set import BoundSet, move_to_pools, release_pages
from scumble_server.factors.rows import RowFactors
from scumble_server.memory.pages import PageSet, Pool

SETS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with toy sizes")
    parser.add_argument("--engines", action="store_true", help="build TensorRT engines and measure them too")
    parser.add_argument("--minutes", type=float, default=10.0, help="sections beyond this time are left out")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --tiny tests this script on a CPU")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    end = time.monotonic() + 60 * arguments.minutes
    plans = [tiny_plan()] if arguments.tiny else [real_plan("sd1.5", 4.0), real_plan("sdxl", 2.0)]
    report: dict[str, Any] = {"machine": machine() | device_info(device), "bases": {}, "left_out": []}
    report["every_kind"] = attempt("every kind", partial(every_kind, device.type))
    with own_stream(device, urgent=True):  # as the loop's thread: a graph is not captured on the default stream
        rates = measure_rates(device, dtype_on(device))
        report["rates"] = rates.report
        for plan in plans:
            results = report["bases"][plan.name] = {}
            if (reason := too_small(plan, device)) is not None:
                report["left_out"].append(reason)
                continue
            bench = attempt(f"{plan.name}: weights", partial(Bench, plan, device, rates))
            if not isinstance(bench, Bench):
                results["weights"] = bench
                continue
            sections = [bench.correctness, bench.bare, bench.mixed, bench.switch, bench.checkpoint, bench.traffic]
            for section in [*sections, bench.exported] if arguments.engines or arguments.tiny else sections:
                if time.monotonic() > end:
                    report["left_out"].append(f"{plan.name}: {section.__name__}")
                    continue
                results[section.__name__] = attempt(f"{plan.name}: {section.__name__}", section)
            del bench
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report["aims"] = aims(report["bases"], {plan.name: plan.aim_traffic for plan in plans}) | aims_of_kinds(
        report["every_kind"]
    )
    print(json.dumps(report, indent=2))


def attempt(name: str, measure: Callable[[], Any]) -> Any:
    """Return what is measured, or what went wrong, and tell it at once: a later section may not come to its end."""
    try:
        found = measure()
    except Exception as error:  # noqa: BLE001 - the next section may go well
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    told = found if isinstance(found, dict) else "loaded"
    print(json.dumps({name: told}, default=str), file=sys.stderr, flush=True)
    return found


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def too_small(plan: Plan, device: torch.device) -> str | None:
    """Say why a card cannot hold our UNet, diffusers', a checkpoint's, and 4 GiB of what they compute with."""
    if device.type == "cpu":
        return None
    needed, has = 3 * plan.unet_bytes + (4 << 30), torch.cuda.get_device_properties(device).total_memory
    return f"{plan.name}: needs {needed >> 30} GiB, the card has {has >> 30}" if has < needed else None


def device_info(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


class Bench:
    """One base on one device: the torch executor, diffusers' UNet with the same weights, sets of LoRAs."""

    def __init__(self, plan: Plan, device: torch.device, rates: Rates) -> None:
        self.plan, self.device, self.rates = plan, device, rates
        self.dtype = dtype_on(device)
        models = plan.models()
        self.theirs: Any = copy.deepcopy(models.unet).to(device, self.dtype).eval().requires_grad_(requires_grad=False)
        family = OURS[plan.family]  # type: ignore[index]
        self.reference = models if plan.family == "sd1" else None
        ours = copy.deepcopy(models)
        for model in (ours.unet, *ours.texts.values()):
            model.to(self.dtype)
        self.executor = TorchExecutor(ours, family, device, self.dtype, 64, Stepping.on(device))
        self.kv_width = sum(2 * kv_slice.width for kv_slice in self.executor.kv_slices)
        layout = self.executor.step_layout
        self.pools = [Pool(extent, device, self.dtype) for extent in (layout.small, layout.rest)]

    # Measurements

    def correctness(self) -> dict[str, Any]:
        """Compare two rows with factors in the serving precision with fp32 on the CPU (not for SDXL)."""
        if self.reference is None:
            return {"left_out": "fp32 on the CPU is measured for SD 1.5 only"}
        models = Models(
            self.reference.unet.float(),
            {name: text.float() for name, text in self.reference.texts.items()},
            self.reference.vae.float(),
        )
        family = OURS[self.plan.family]  # type: ignore[index]
        exact = TorchExecutor(models, family, torch.device("cpu"), torch.float32, 64)
        sample, timestep, inputs = self.batch(2, sets=2, rank=16)
        prediction = self.executor.denoise(sample, timestep, inputs).cpu()
        moved = inputs.to(torch.device("cpu"), torch.float32)
        expected = exact.denoise(sample.cpu().float(), timestep.cpu(), moved)
        self.reference = None
        return {"relative_error": float((prediction - expected).norm() / expected.norm())}

    def bare(self) -> dict[str, Any]:
        """Measure eight rows without adapters against diffusers' UNet on the same rows."""
        sample, timestep, inputs = self.batch(SETS)
        states = torch.randn(SETS, 77, self.plan.context, device=self.device, dtype=self.dtype)
        added = {"text_embeds": inputs.pooled, "time_ids": inputs.sizes}
        typed = sample.to(self.dtype)

        def plain() -> None:
            self.theirs(typed, timestep, states, added_cond_kwargs=added, return_dict=False)

        ours, theirs = self.timed(lambda: self.executor.denoise(sample, timestep, inputs)), self.timed(plain)
        floor = self.flops(sample, timestep, inputs) / self.rates.flops
        return {"ours_s": ours, "diffusers_s": theirs, "ratio": ours / theirs, "floor_s": floor}

    def mixed(self) -> dict[str, Any]:
        """Measure eight rows with a set each, and the arithmetic that the factors add."""
        sample, timestep, inputs = self.batch(SETS)
        bare = self.timed(lambda: self.executor.denoise(sample, timestep, inputs))
        bare_flops = self.flops(sample, timestep, inputs)
        report: dict[str, Any] = {"bare_s": bare, "bare_flops": bare_flops}
        for rank in RANKS:
            _, _, inputs = self.batch(SETS, sets=SETS, rank=rank)
            seconds = self.timed(lambda inputs=inputs: self.executor.denoise(sample, timestep, inputs))
            added = self.flops(sample, timestep, inputs) / bare_flops
            report[f"rank_{rank}"] = {
                "seconds": seconds,
                "of_bare_throughput": bare / seconds,
                "cost": seconds / bare - 1,
                "arithmetic": added - 1,
                "floor_s": added * bare_flops / self.rates.flops,
            }
        return report

    def switch(self) -> dict[str, Any]:
        """Measure the time to change a batch to one with another set of rank 64, until its first step may start."""
        sets = [self.bound(64) for _ in range(3)]
        on_host = self.on_host(64)

        def join(bound: BoundSet) -> None:
            self.executor.denoise(*self.batch(1, bound=[bound]))

        def cold() -> None:
            bound = move_to_pools(on_host, self.pools)
            join(bound)
            release_pages(bound)

        join(sets[0])
        base = self.batch(1, bound=[sets[0]])
        step = self.timed(lambda: self.executor.denoise(*base))
        warm = self.timed(lambda: [join(one) for one in sets]) / len(sets)
        nbytes = sum(tensor.nbytes for tensor in on_host.small.holder.tensors)
        return {
            "set_bytes": nbytes,
            "warm_s": max(warm - step, 0.0),
            "cold_s": max(self.timed(cold) - step, 0.0),
            "cold_floor_s": nbytes / self.rates.uploaded_bytes,
        }

    def checkpoint(self) -> dict[str, Any]:
        """Measure the time to step with another checkpoint's UNet, all of which is in host memory."""
        changed = {"unet": {name: values.cpu() for name, values in self.executor.graphs.states["unet"].items()}}
        batch = self.batch(1)
        nbytes = sum(values.nbytes for values in changed["unet"].values())
        cold = self.timed(lambda: self.executor.variant(changed).denoise(*batch))
        step = self.timed(lambda: self.executor.denoise(*batch))
        return {"bytes": nbytes, "host_s": max(cold - step, 0.0), "floor_s": nbytes / self.rates.uploaded_bytes}

    def traffic(self) -> dict[str, Any]:
        """Draw guided images with a LoRA each, from noise to pixels: by Scumble in one batch, by diffusers in turn."""
        plan, images = self.plan, self.plan.images
        sample, timestep, inputs = self.batch(2 * images, sets=images, rank=16, rows_each=2)
        one = torch.randn(1, 4, plan.latents, plan.latents, device=self.device)
        states = torch.randn(2 * images, 77, plan.context, device=self.device, dtype=self.dtype)
        typed = sample.to(self.dtype)

        def decode() -> None:
            self.executor.vae.decode(one)

        def ours() -> None:
            for _ in range(plan.steps):
                self.executor.denoise(sample, timestep, inputs)
            for _ in range(images):
                decode()

        def step(unet: Any, rows: int) -> None:
            pooled, sizes = (None if each is None else each[:rows] for each in (inputs.pooled, inputs.sizes))
            added = {"text_embeds": pooled, "time_ids": sizes}
            unet(typed[:rows], timestep[:rows], states[:rows], added_cond_kwargs=added, return_dict=False)

        theirs = Diffusers(self.theirs, 16, images, step)
        theirs.load()
        seconds = {"ours_s": self.timed(ours)}
        seconds["diffusers_s"] = self.timed(lambda: theirs.one_after_another(plan.steps, decode))
        seconds["diffusers_shared_s"] = self.timed(lambda: theirs.one_shared(plan.steps, decode))
        theirs.compile()
        seconds["diffusers_hot_swapped_s"] = self.timed(lambda: theirs.hot_swapped(plan.steps, decode))
        floor = plan.steps * self.flops(sample, timestep, inputs) / self.rates.flops
        of_ours = {f"{name.removesuffix('_s')}_speedup": value / seconds["ours_s"] for name, value in seconds.items()}
        return {"images": images, "steps": plan.steps, **seconds, "floor_s": floor, **of_ours}

    def exported(self) -> dict[str, Any]:
        """Measure exported graphs: without adapters, with eight sets, and with factors of scale 0."""
        models = self.plan.models()
        for model in (models.unet, *models.texts.values()):
            model.to(self.dtype)
        precision: Precision = "fp16" if self.dtype == torch.float16 else "fp32"
        sample, timestep, inputs = self.batch(SETS)
        states = torch.randn(SETS, 77, self.plan.context, device=self.device, dtype=self.dtype)
        feeds = {"sample": sample, "timestep": timestep, "states": states}
        if inputs.pooled is not None and inputs.sizes is not None:
            feeds |= {"pooled": inputs.pooled, "sizes": inputs.sizes}
        with tempfile.TemporaryDirectory(prefix="scumble-exported-") as folder:
            start = time.monotonic()
            made = exported.make(models, self.plan.family, precision, self.plan.latents, self.device, Path(folder))
            report: dict[str, Any] = {"runtime": made.runtime, "made_in_s": time.monotonic() - start}
            cases = {"bare": inputs} | {f"rank_{r}": self.batch(SETS, sets=SETS, rank=r)[2] for r in RANKS}
            silent = cases["rank_16"]
            assert silent.factors is not None
            factors = replace(silent.factors, scale=torch.zeros_like(silent.factors.scale))
            cases["empty"] = replace(silent, factors=factors)
            report["plain_s"] = self.timed(lambda: made.plain(feeds))
            for name, case in cases.items():
                report[f"{name}_s"] = self.timed(lambda case=case: made.executor.denoise(sample, timestep, case))
        return report

    # Inputs and tools

    def batch(
        self, rows: int, *, sets: int = 0, rank: int = 16, rows_each: int = 1, bound: list[BoundSet] | None = None
    ) -> tuple[Tensor, Tensor, StepInputs]:
        """Stack rows as the loop does; the first `sets` images have a set each."""
        lora_sets = bound if bound is not None else [self.bound(rank) for _ in range(sets)]
        side, device = self.plan.latents, self.device
        phases = []
        for index in range(rows // rows_each):
            kv = torch.randn(rows_each, 77, self.kv_width, device=device, dtype=self.dtype)
            factors = None
            if index < len(lora_sets):
                factors = RowFactors(lora_sets[index], torch.ones(lora_sets[index].rank))
            xl = self.plan.family == "sdxl"
            pooled = torch.randn(rows_each, 1280, device=device, dtype=self.dtype) if xl else None
            sizes = (1024, 1024, 0, 0, 1024, 1024) if xl else None
            phases.append(Phase(self.executor, kv, factors, pooled=pooled, sizes=sizes))
        sample = torch.randn(rows, 4, side, side, device=device)
        return sample, torch.full((rows,), 500.0, device=device), stacking.stack(phases, self.executor.device).inputs

    def bound(self, rank: int) -> BoundSet:
        return move_to_pools(self.on_host(rank), self.pools)

    def on_host(self, rank: int) -> BoundSet:
        extent = self.executor.step_layout.small
        A, B = (
            0.01 * torch.randn(pages_for(rank), PAGE * size).to(self.dtype)
            for size in (extent.total_in, extent.total_out)
        )
        return BoundSet(PageSet.own(A, B), None, (rank,))

    def flops(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> int:
        with torch.inference_mode(mode=False), count_flops() as counted:
            self.executor.graphs.denoiser(sample.to(self.dtype), timestep, inputs.to(self.device, self.dtype))
        return counted[0]

    def timed(self, run: Callable[[], object], rounds: int = 5) -> float:
        """Return median seconds after a warm-up, including the device's work."""
        measured = []
        with torch.inference_mode():
            for _ in range(rounds + 1):
                start = time.perf_counter()
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                measured.append(time.perf_counter() - start)
        return statistics.median(measured[1:])


if __name__ == "__main__":
    main()
