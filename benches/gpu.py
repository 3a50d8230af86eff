"""Benchmarks for a machine with a GPU: at most ten minutes, no network, random weights. Prints JSON.

    python benches/gpu.py                 SD 1.5 at 512² and SDXL at 1024² on CUDA
    python benches/gpu.py --engines       on TensorRT too
        python benches/gpu.py --tiny          the same script on a CPU with toy sizes, to test that it works

It measures the following; `aims` in the output compares each figure with a threshold:

* correctness: a mixed step in the serving precision against fp32 on the CPU
* bare: our graph without adapters against diffusers' own UNet
* mixed: 8 rows with 8 sets of LoRAs against 8 bare rows, and against the added arithmetic of the factors
* switch: a set joins a batch from the device (warm) or from host memory (cold)
* traffic: images with different adapters, drawn by Scumble in one batch, by diffusers with PEFT one after another
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import exported
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from engines import random_models
from measure import count_flops, machine
from memory import FAMILIES, FamilyConfigs
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

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

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
RANKS = (16, 64)
SETS = 8


@dataclass(frozen=True)
class Plan:
    """A base to measure: `latents` is the side of a square; `context` the width of text states."""

    name: str
    models: Callable[[], Models]
    family: str
    latents: int
    context: int
    steps: int
    images: int
    aim_traffic: float


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
    with own_stream(device, urgent=True):  # as the loop's thread: a graph is not captured on the default stream
        for plan in plans:
            results = report["bases"][plan.name] = {}
            bench = attempt(f"{plan.name}: weights", partial(Bench, plan, device))
            if not isinstance(bench, Bench):
                results["weights"] = bench
                continue
            sections = [bench.correctness, bench.bare, bench.mixed, bench.switch, bench.traffic]
            for section in [*sections, bench.exported] if arguments.engines or arguments.tiny else sections:
                if time.monotonic() > end:
                    report["left_out"].append(f"{plan.name}: {section.__name__}")
                    continue
                results[section.__name__] = attempt(f"{plan.name}: {section.__name__}", section)
            del bench
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report["aims"] = aims(report["bases"], {plan.name: plan.aim_traffic for plan in plans})
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


def device_info(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


class Bench:
    """One base on one device: the torch executor, diffusers' UNet with the same weights, sets of LoRAs."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
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
        return {"ours_s": ours, "diffusers_s": theirs, "ratio": ours / theirs}

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
        return {"set_bytes": nbytes, "warm_s": max(warm - step, 0.0), "cold_s": max(self.timed(cold) - step, 0.0)}

    def traffic(self) -> dict[str, Any]:
        """Draw guided images with a LoRA each, from noise to pixels: by Scumble in one batch, by diffusers in turn."""
        plan, images = self.plan, self.plan.images
        sample, timestep, inputs = self.batch(2 * images, sets=images, rank=16, rows_each=2)
        latents = torch.randn(images, 4, plan.latents, plan.latents, device=self.device)
        decode = self.executor.vae.decode

        def ours() -> None:
            for _ in range(plan.steps):
                self.executor.denoise(sample, timestep, inputs)
            for one in latents:
                decode(one[None])

        names = [f"a{index}" for index in range(images)]
        for name in names:
            self.theirs.add_adapter(LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False), name)
        self.theirs.to(self.device, self.dtype)
        states = torch.randn(2, 77, plan.context, device=self.device, dtype=self.dtype)
        added = {
            "text_embeds": None if inputs.pooled is None else inputs.pooled[:2],
            "time_ids": None if inputs.sizes is None else inputs.sizes[:2],
        }
        typed = sample[:2].to(self.dtype)

        def theirs() -> None:
            for name, one in zip(names, latents, strict=True):
                self.theirs.set_adapters(name)
                for _ in range(plan.steps):
                    self.theirs(typed, timestep[:2], states, added_cond_kwargs=added, return_dict=False)
                decode(one[None])

        mine, others = self.timed(ours, rounds=1), self.timed(theirs, rounds=1)
        return {"images": images, "steps": plan.steps, "ours_s": mine, "diffusers_s": others, "speedup": others / mine}

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


def aims(bases: dict[str, Any], traffic: dict[str, float]) -> dict[str, bool]:
    """Compare the figures with thresholds; sections that were left out or failed have no entry."""
    met: dict[str, bool] = {}
    for name, sections in bases.items():
        figures = {section: found for section, found in sections.items() if "failed" not in found}
        if "relative_error" in figures.get("correctness", {}):
            met[f"{name}: a mixed step within 2 % of fp32"] = figures["correctness"]["relative_error"] <= 0.02
        if "bare" in figures:
            met[f"{name}: the bare graph at most 1.03x diffusers'"] = figures["bare"]["ratio"] <= 1.03
        for rank in RANKS if "mixed" in figures else ():
            at = figures["mixed"][f"rank_{rank}"]
            met[f"{name}: rank {rank}, 8 sets, 90 % of the bare batch"] = at["of_bare_throughput"] >= 0.9
            met[f"{name}: rank {rank} costs at most 1.5x its arithmetic"] = at["cost"] <= 1.5 * at["arithmetic"]
        if "exported" in figures:
            at = figures["exported"]
            met[f"{name}: the bare graph exported at most 1.03x a plain export"] = at["bare_s"] <= 1.03 * at["plain_s"]
            for rank in RANKS:
                met[f"{name}: rank {rank} exported, 90 % of the bare batch"] = (
                    at["bare_s"] >= 0.9 * at[f"rank_{rank}_s"]
                )
        if "switch" in figures:
            met[f"{name}: a warm switch in 15 ms"] = figures["switch"]["warm_s"] <= 0.015
        if "traffic" in figures:
            met[f"{name}: {traffic[name]:g}x diffusers on mixed traffic"] = (
                figures["traffic"]["speedup"] >= traffic[name]
            )
    return met


def real_plan(name: str, aim: float) -> Plan:
    family: FamilyConfigs = FAMILIES[name]
    ours = {"sd1.5": "sd1", "sdxl": "sdxl"}[name]
    return Plan(
        name, lambda: random_models(family, name), ours, family.latents, family.unet["cross_attention_dim"], 20, 4, aim
    )


def tiny_plan() -> Plan:
    def models() -> Models:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
            )
        )
        return Models(unet, {"text_encoder": text}, vae)

    return Plan("tiny", models, "sd1", 8, 32, 2, 2, 1.0)


if __name__ == "__main__":
    main()
