"""LoRAs whose alpha differs from module to module: the oracle is a base with ΔW added to its weights.

diffusers mis-scales such files (its alpha patterns miss the modules' names), so it cannot be the oracle here.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from scumble.request import Adapter, Request

if TYPE_CHECKING:
    from pathlib import Path

    from support.running import Running

pytestmark = pytest.mark.every_executor
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}


def merged(base: Path, file: Path, weight: float) -> StableDiffusionPipeline:
    """W + weight·(alpha/r)·B·A for every module of `file`, alphas straight from its header."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    with safe_open(file, "pt") as stored:
        header: dict[str, Any] = json.loads(stored.metadata()["lora_adapter_metadata"])
        for key in stored.keys():  # noqa: SIM118 - not a dict
            if not key.endswith("lora_A.weight"):
                continue
            name = key.removesuffix(".lora_A.weight")
            component, _, module = name.partition(".")
            down, up = stored.get_tensor(key), stored.get_tensor(key.replace("lora_A", "lora_B"))
            alpha = header[f"{component}.lora_alpha"]
            for pattern, value in header[f"{component}.alpha_pattern"].items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    alpha = value
            delta = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)) * (alpha / down.shape[0]) * weight
            model = getattr(pipeline, component)
            try:
                weights = model.get_submodule(module).weight
            except AttributeError:
                weights = model.get_submodule(module.removeprefix("text_model.")).weight
            weights.data += delta.view(weights.shape)
    return pipeline


def test_mixed_alphas_equal_merged_weights(running: Running, diffusers_alone: Any) -> None:
    request = Request.parse({**PLAIN, "adapters": [Adapter(ref="l/mixed", weight=0.4)]})
    ours = running.run([request])[0]
    bare = request.model_copy(update={"adapters": ()})
    reference = diffusers_alone(running.files, bare, merged(running.files["base"], running.files["l/mixed"], 0.4))
    assert (ours.latents - reference.latents).abs().max() <= 1e-3
    without = diffusers_alone(running.files, bare)
    assert (reference.latents - without.latents).abs().max() >= 0.05, "the oracle shows nothing"
    same_alpha = merged_with_one_alpha(running)
    uniform = diffusers_alone(running.files, bare, same_alpha)
    assert (reference.latents - uniform.latents).abs().max() >= 0.05, "the alphas make no difference"


def merged_with_one_alpha(running: Running) -> StableDiffusionPipeline:
    """What a loader makes of the file that overlooks its alpha pattern."""
    pipeline = StableDiffusionPipeline.from_pretrained(running.files["base"], local_files_only=True)
    pipeline.load_lora_weights(running.files["l/mixed"], adapter_name="mixed")
    for model in (pipeline.unet, pipeline.text_encoder):
        for module in model.modules():
            if hasattr(module, "lora_A") and "mixed" in module.scaling:
                module.scaling["mixed"] = 2.0 * 0.4
    return pipeline
