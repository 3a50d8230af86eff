"""Measures eight requests with eight different adapters: Scumble in one batch against diffusers one after another.

Once with LoRAs only, once with adapters of every kind that diffusers supports. Prints JSON. Each round runs every
contender once, in turn, in this process; figures are medians over the rounds after a warm-up round.
"""

from __future__ import annotations

import argparse
import io
import json
import queue
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from measure import alternate, machine
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble.events import Done, Event, Failed
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.service import Service
from support.every_kind import EveryKind, publish_every_kind, request_for

REQUESTS = 8
STEPS = 20
SIDE = 128
PROMPT = "a red apple, noto style"
BASE = Path(__file__).parents[1] / "demo" / "base"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = {
        "machine": machine(),
        "rounds": arguments.rounds,
        "loras": mixed_loras(arguments.base, arguments.rounds),
        "kinds": mixed_kinds(arguments.base, arguments.rounds),
    }
    print(json.dumps(result, indent=2))


def mixed_loras(base: Path, rounds: int) -> dict[str, object]:
    """Return the seconds for the eight images, and Scumble's speedup."""
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
        requests = [
            Request(
                prompt=PROMPT, seed=seed, steps=STEPS, scheduler="ddim", adapters=(Adapter(ref=f"bench/lora{seed}"),)
            )
            for seed in range(REQUESTS)
        ]
        seconds = alternate(
            {
                "scumble": lambda: _ours(service, requests),
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
        "batch_sizes": stats.batch_sizes,
        "mixed_steps": stats.mixed_steps,
    }


def mixed_kinds(base: Path, rounds: int) -> dict[str, object]:
    """Measure eight requests of six kinds. diffusers' pipelines are loaded beforehand."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with Registry.open(home, create=True) as registry:
            every = publish_every_kind(registry, base, Path(folder) / "kinds", image_side=SIDE)
        service = Service.open(ServerConfig(home=home, base=every.base))
        drawn = [_by_diffusers(every, adapter) for adapter in KINDS]
        requests = [
            request_for(every, [adapter], prompt=PROMPT, seed=seed, steps=STEPS, scheduler="ddim")
            for seed, adapter in enumerate(KINDS)
        ]
        seconds = alternate(
            {
                "scumble": lambda: _ours(service, requests),
                "diffusers_preloaded": lambda: [draw(seed) for seed, draw in enumerate(drawn)],
            },
            rounds,
        )
        stats = service.stats()
        service.close()
    return {
        "adapters": [adapter["ref"] for adapter in KINDS],
        "steps": STEPS,
        "seconds": seconds,
        "speedup_against_preloaded": round(seconds["diffusers_preloaded"] / seconds["scumble"], 3),
        "batch_sizes": stats.batch_sizes,
        "mixed_steps": stats.mixed_steps,
    }


KINDS: list[dict[str, Any]] = [
    {"ref": "lora/small", "weight": 0.5},
    {"ref": "lora/full", "weight": 0.3},
    {"ref": "word/bad"},
    {"ref": "ip/base", "weight": 0.6, "image": "red"},
    {"ref": "ip/plus", "weight": 0.6, "image": "blue"},
    {"ref": "net/one", "weight": 0.5, "image": "shape"},
    {"ref": "net/one", "weight": 0.8, "image": "blue"},
    {"ref": "dream/dog"},
]
"""Return the requests that diffusers supports, which are all but hypernetworks."""


def _by_diffusers(every: EveryKind, adapter: dict[str, Any]) -> Callable[[int], None]:
    """Return diffusers' pipeline for this adapter, to be called with a seed."""
    ref, weight = adapter["ref"], adapter.get("weight", 1.0)
    file = every.files[ref]
    kind = ref.split("/")[0]
    arguments: dict[str, Any] = {}
    if "image" in adapter:
        look = Image.open(io.BytesIO(every.pictures[adapter["image"]])).convert("RGB")
    if kind == "net":
        net = ControlNetModel.from_pretrained(file, local_files_only=True)
        pipeline = _pipeline(every.files[every.base], StableDiffusionControlNetPipeline, controlnet=net)
        arguments = {"image": look, "controlnet_conditioning_scale": weight}
    elif kind == "dream":
        pipeline = _pipeline(file)
    elif kind == "ip":
        encoder = CLIPVisionModelWithProjection.from_pretrained(every.files["ip/base"].parent / "encoder")
        pipeline = _pipeline(
            every.files[every.base],
            image_encoder=encoder,
            feature_extractor=CLIPImageProcessorPil(
                size=encoder.config.image_size, crop_size=encoder.config.image_size
            ),
        )
        pipeline.load_ip_adapter(file.parent, subfolder="", weight_name=file.name, image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(weight)
        arguments = {"ip_adapter_image": look}
    else:
        pipeline = _pipeline(every.files[every.base])
        if kind == "lora":
            pipeline.load_lora_weights(file, adapter_name="one")
            pipeline.set_adapters(["one"], [weight])
        else:
            pipeline.load_textual_inversion(file, token="<bad>")
    return lambda seed: _generate(pipeline, seed, **arguments)


def _ours(service: Service, requests: list[Request]) -> None:
    ends: queue.Queue[Event] = queue.Queue()

    def on_event(event: Event) -> None:
        if isinstance(event, Done | Failed):
            ends.put(event)

    for request in requests:
        service.submit(request, on_event)
    for _ in requests:
        end = ends.get()
        if isinstance(end, Failed):
            raise end.error


def _load_each(pipeline: Any, files: list[Path]) -> None:
    for seed, file in enumerate(files):
        pipeline.load_lora_weights(file, adapter_name="one")
        _generate(pipeline, seed)
        pipeline.unload_lora_weights()


def _preloaded(pipeline: Any) -> None:
    for seed in range(REQUESTS):
        pipeline.set_adapters([f"lora{seed}"], [1.0])
        _generate(pipeline, seed)


def _generate(pipeline: Any, seed: int, **arguments: Any) -> None:
    pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        **arguments,
    )


def _pipeline(base: Path, kind: Any = StableDiffusionPipeline, **parts: Any) -> Any:
    pipeline = kind.from_pretrained(base, local_files_only=True, torch_dtype=torch.float32, **parts)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _lora(base: Path, folder: Path, seed: int) -> Path:
    """Write a random rank-16 LoRA on the UNet's attention, made by PEFT."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


if __name__ == "__main__":
    main()
