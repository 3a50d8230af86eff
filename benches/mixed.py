"""Eight requests with eight different LoRA sets: one batch of ours against diffusers one after another.

Also: what factors cost the denoiser, against the bare graph, beside what their arithmetic adds.
Prints JSON. Everything is measured side by side in this process: each round runs every contender once, in turn;
a figure is the median over the rounds after one warm-up round.
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measure import alternate, count_flops, machine
from peft import LoraConfig, get_peft_model_state_dict

from scumble.events import Done, Event, Failed
from scumble.request import Adapter, Request
from scumble_build.adapted import Factors
from scumble_build.denoiser import Denoiser, KVProjection
from scumble_build.inputs import StepInputs
from scumble_build.layout import Layout
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.service import Service

REQUESTS = 8
STEPS = 20
BASE = Path(__file__).parents[1] / "demo" / "base"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wide", action="store_true", help="measure factors at SD 1.5's real width too (4 GB)")
    arguments = parser.parse_args()
    result = {
        "machine": machine(),
        "rounds": arguments.rounds,
        "mixed": mixed(arguments.base, arguments.rounds),
        "factors_demo_base": factors(_load_unet(arguments.base), 16, arguments.rounds),
    }
    if arguments.wide:
        result["factors_sd15_width"] = factors(UNet2DConditionModel(**SD15), 16, arguments.rounds)
    print(json.dumps(result, indent=2))


# stable-diffusion-v1-5's UNet, random weights: speed does not depend on them.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def mixed(base: Path, rounds: int) -> dict[str, object]:
    """Seconds for the eight pictures, and how many times faster ours is."""
    with tempfile.TemporaryDirectory() as folder:
        files = [_lora(base, Path(folder) / str(seed), seed) for seed in range(REQUESTS)]
        with Registry.open(Path(folder) / "home", create=True) as registry:
            registry.publish(base, name="bench/base")
            for seed, file in enumerate(files):
                registry.publish(file, name=f"bench/lora{seed}", base="bench/base")
        service = Service.open(ServerConfig(home=Path(folder) / "home", base="bench/base"))
        loading, preloaded = _pipeline(base), _pipeline(base)
        for seed, file in enumerate(files):
            preloaded.load_lora_weights(file, adapter_name=f"lora{seed}")
        seconds = alternate(
            {
                "scumble": lambda: _ours(service),
                "diffusers_load_each": lambda: _load_each(loading, files),
                "diffusers_preloaded": lambda: _preloaded(preloaded),
            },
            rounds,
        )
        stats = service.stats()
        service.close()
    return {
        "requests": REQUESTS,
        "steps": STEPS,
        "seconds": seconds,
        "speedup_against_loading": round(seconds["diffusers_load_each"] / seconds["scumble"], 3),
        "speedup_against_preloaded": round(seconds["diffusers_preloaded"] / seconds["scumble"], 3),
        "batch_sizes": stats["batch_sizes"],
        "mixed_steps": stats["mixed_steps"],
    }


def factors(unet: UNet2DConditionModel, size: int, rounds: int) -> dict[str, object]:
    """A batch of eight guided images: the step's time relative to the bare graph, and the arithmetic's ratio."""
    unet = unet.eval().requires_grad_(False)
    projection = KVProjection(unet)
    denoiser = Denoiser(unet, projection.slices)
    rows = 2 * REQUESTS
    sample = torch.randn(rows, 4, size, size)
    timestep = torch.linspace(900, 100, rows)
    kv = projection(torch.randn(rows, 77, unet.config.cross_attention_dim))
    cases: dict[str, Factors | None] = {"bare": None}
    for rank in (16, 64):
        cases[f"rank {rank}, one image"] = _factors(denoiser.layout, 1, rank)
        cases[f"rank {rank}, all images"] = _factors(denoiser.layout, REQUESTS, rank)
    flops = {}
    for name, carried in cases.items():
        with count_flops() as counted:
            denoiser(sample, timestep, StepInputs(kv, factors=carried))
        flops[name] = counted[0]
    with torch.inference_mode():
        seconds = alternate(
            {
                name: (lambda carried=carried: denoiser(sample, timestep, StepInputs(kv, factors=carried)))
                for name, carried in cases.items()
            },
            rounds,
        )
    return {
        name: {
            "seconds": seconds[name],
            "time_ratio": round(seconds[name] / seconds["bare"], 4),
            "arithmetic_ratio": round(flops[name] / flops["bare"], 4),
        }
        for name in cases
    }


def _ours(service: Service) -> None:
    ends: queue.Queue[Event] = queue.Queue()

    def on_event(event: Event) -> None:
        if isinstance(event, Done | Failed):
            ends.put(event)

    for seed in range(REQUESTS):
        adapters = (Adapter(ref=f"bench/lora{seed}"),)
        service.submit(Request(prompt=PROMPT, seed=seed, steps=STEPS, scheduler="ddim", adapters=adapters), on_event)
    for _ in range(REQUESTS):
        end = ends.get()
        if isinstance(end, Failed):
            raise end.error


PROMPT = "a red apple, noto style"


def _load_each(pipeline: StableDiffusionPipeline, files: list[Path]) -> None:
    for seed, file in enumerate(files):
        pipeline.load_lora_weights(file, adapter_name="one")
        _generate(pipeline, seed)
        pipeline.unload_lora_weights()


def _preloaded(pipeline: StableDiffusionPipeline) -> None:
    for seed in range(REQUESTS):
        pipeline.set_adapters([f"lora{seed}"], [1.0])
        _generate(pipeline, seed)


def _generate(pipeline: StableDiffusionPipeline, seed: int) -> None:
    pipeline(PROMPT, num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(seed), output_type="np")


def _pipeline(base: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True, torch_dtype=torch.float32)


def _lora(base: Path, folder: Path, seed: int) -> Path:
    """A random rank-16 LoRA on the UNet's attention, of PEFT's making."""
    unet = _load_unet(base)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


def _factors(layout: Layout, images: int, rank: int) -> Factors:
    """Every target of `images` images, each with a slot of its own."""
    return Factors(
        torch.randn(images, layout.small.total_in, rank),
        torch.randn(images, layout.small.total_out, rank),
        torch.arange(images).repeat_interleave(2),
        torch.full((2 * images, rank), 1e-3),
        rows_per_slot=2,
    )


if __name__ == "__main__":
    main()
