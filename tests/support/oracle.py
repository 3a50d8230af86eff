"""diffusers as the oracle of whole requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from scumble.request import Request

SDE, KARRAS = {"algorithm_type": "sde-dpmsolver++"}, {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, KARRAS),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, SDE),
    "dpmpp_2m_sde_karras": (DPMSolverMultistepScheduler, SDE | KARRAS),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, SDE),
    "dpmpp_sde_karras": (DPMSolverSinglestepScheduler, SDE | KARRAS),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
"""diffusers' class for each name, and what its documentation adds for the webui's names."""


@dataclass
class Reference:
    latents: Tensor
    pixels: np.ndarray


def diffusers_scheduler(request: Request, config: dict[str, Any]) -> Any:
    kind, named = SCHEDULERS[request.scheduler or "ddim"]
    options = {
        "timestep_spacing": request.options.timestep_spacing,
        "rescale_betas_zero_snr": request.options.rescale_betas,
    }
    return kind.from_config(config, **named, **{name: value for name, value in options.items() if value is not None})


def diffusers_alone(
    files: dict[str, Path], request: Request, pipeline: StableDiffusionPipeline | None = None
) -> Reference:
    """The same request through diffusers' own pipeline, LoRA loader and scheduler."""
    loaded = pipeline is not None
    pipeline = pipeline or StableDiffusionPipeline.from_pretrained(files["base"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers_scheduler(request, DDIMScheduler.load_config(files["base"] / "scheduler"))
    if request.adapters and not loaded:
        for index, adapter in enumerate(request.adapters):
            pipeline.load_lora_weights(files[adapter.ref], adapter_name=f"a{index}")
        names = [f"a{index}" for index in range(len(request.adapters))]
        pipeline.set_adapters(names, [_weights(adapter) for adapter in request.adapters])
    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "eta": request.options.eta or 0.0,
    }
    count = request.num_images
    arguments["callback_on_step_end"] = _schedule(request)
    arguments["callback_on_step_end"](pipeline, -1, None, {})
    with torch.inference_mode():
        generators = [torch.Generator("cpu").manual_seed((request.seed or 0) + i) for i in range(count)]
        latents = pipeline(**arguments, num_images_per_prompt=count, generator=generators, output_type="latent").images
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pixels = pipeline.image_processor.postprocess(decoded, output_type="np")
    return Reference(latents, (pixels * 255).round())


def _schedule(request: Request) -> Callable[..., dict[str, object]]:
    """Sets the UNet's weights for the step that comes next. The text encoder keeps its own."""

    def before_next(
        pipeline: StableDiffusionPipeline, step: int, _timestep: object, state: dict[str, object]
    ) -> object:
        for index, adapter in enumerate(request.adapters):
            active = adapter.is_active(step + 1, request.steps or 0)
            for module in pipeline.unet.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_scale(f"a{index}", adapter.weight if active else 0.0)
        return state

    scheduled = any(adapter.start > 0 or adapter.end < 1 for adapter in request.adapters)
    return before_next if scheduled else lambda *_: {}


def _weights(adapter: object) -> object:
    weight, text_weight = adapter.weight, adapter.text_weight  # type: ignore[attr-defined]
    text = weight if text_weight is None else text_weight
    if adapter.blocks is None:  # type: ignore[attr-defined]
        return {"unet": weight, "text_encoder": text}
    # diffusers multiplies nothing: a block's weight replaces the adapter's.
    scales = {name: value * weight for name, value in adapter.blocks.items()}  # type: ignore[attr-defined]
    unet = {
        "down": {"block_0": scales.get("down_blocks.0", weight)},
        "mid": scales.get("mid_block", weight),
        "up": {"block_1": scales.get("up_blocks.1", weight)},
    }
    return {"unet": unet, "text_encoder": text}


def changed_weights(pipeline: StableDiffusionPipeline, tensors: dict[str, Tensor]) -> Iterator[tuple[Any, Tensor]]:
    """Each weight that a DoRA's file changes, and what it becomes at weight 1 (PEFT's axis or the webui's)."""
    flat = {
        f"lora_unet_{name.replace('.', '_')}": module.weight
        for name, module in pipeline.unet.named_modules()
        if hasattr(module, "weight")
    }
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            component, _, module = name.partition(".")
            model = getattr(pipeline, component)
            known = dict(model.named_modules())
            weight = known.get(module, known.get(module.removeprefix("text_model."))).weight
            up, axis, scale = tensors[f"{name}.lora_B.weight"], 0, 2.0
            magnitude = tensors.get(f"{name}.lora_magnitude_vector")
            magnitude = tensors[f"{name}.lora_magnitude_vector.weight"] if magnitude is None else magnitude
        elif key.endswith("lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            weight, up, axis = flat[name], tensors[f"{name}.lora_up.weight"], 1
            scale, magnitude = float(tensors[f"{name}.alpha"]) / len(down), tensors[f"{name}.dora_scale"]
        else:
            continue
        changed = weight + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        rest = [dim for dim in range(weight.ndim) if dim != axis]
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        yield (
            weight,
            (magnitude.view(shape) * changed / torch.linalg.vector_norm(changed, dim=rest, keepdim=True)).detach(),
        )
