"""Computes and measures a base's memory: weights, additions per request, and a step at its training size.

Weights are random at the real sizes of SD 1.5, 2.1 and XL. `--measure FAMILY` runs one step on the CPU in its own
process and reports the growth of its resident memory. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from measure import machine
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from scumble_build.graphs.denoiser import Denoiser, KVProjection
from scumble_build.graphs.inputs import StepInputs

VIT_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
VIT_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "vocab_size": 49408,
}
BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "vocab_size": 49408,
    "projection_dim": 1280,
}
FULL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@dataclass(frozen=True)
class FamilyConfigs:
    """Configs of the published checkpoints; `latents` is the side that they were trained at."""

    unet: dict[str, Any]
    texts: tuple[tuple[type[nn.Module], dict[str, Any]], ...]
    latents: int


FAMILIES = {
    "sd1.5": FamilyConfigs({"cross_attention_dim": 768, "attention_head_dim": 8}, ((CLIPTextModel, VIT_L),), 64),
    "sd2.1": FamilyConfigs(
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        ((CLIPTextModel, VIT_H),),
        96,
    ),
    "sdxl": FamilyConfigs(
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        ((CLIPTextModel, VIT_L), (CLIPTextModelWithProjection, BIG_G)),
        128,
    ),
}
ROWS = 2
"""One guided image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=sorted(FAMILIES), action="append", default=[])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--inside", choices=["step", "decode"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.inside:
        inside = {"step": step, "decode": decode}[arguments.inside]
        print(json.dumps(inside(FAMILIES[arguments.measure[0]], dtype)))
        return
    bases: dict[str, Any] = {name: computed(family) for name, family in FAMILIES.items()}
    for name in arguments.measure:
        bases[name]["measured"] = {}
        for inside in ("step", "decode"):
            command = [sys.executable, __file__, "--inside", inside, "--measure", name, "--dtype", arguments.dtype]
            bases[name]["measured"] |= json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    print(json.dumps({"machine": machine(), "bases": bases}, indent=2))


def computed(family: FamilyConfigs) -> dict[str, Any]:
    """Return counts of numbers, not bytes: times 2 in half precision, times 4 in float32."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.unet, sample_size=family.latents)
        texts = [kind(CLIPTextConfig(**config)) for kind, config in family.texts]
        vae = AutoencoderKL(**FULL_VAE)
        weights = {"unet": _count(unet), "text_encoders": sum(map(_count, texts)), "vae": _count(vae)}
        projection = KVProjection(unet)
        denoiser = Denoiser(unet, projection.slices)
    layouts = {"small": denoiser.layout.small, "full": denoiser.layout.full}
    return {
        "weights": weights | {"all": sum(weights.values())},
        "keys_and_values_per_row_of_75_words": 77 * projection.layout.full.total_out,
        "keys_and_values_per_row_of_an_ip_adapter_with_4_tokens": 4 * projection.layout.full.total_out,
        "factors_per_rank_column": {name: extent.total_in + extent.total_out for name, extent in layouts.items()},
    }


@torch.inference_mode()
def decode(family: FamilyConfigs, dtype: torch.dtype) -> dict[str, Any]:
    """Return the peak GiB of resident memory that decoding one picture adds to the VAE."""
    vae = _filled(AutoencoderKL, FULL_VAE, dtype)
    before = _peak()
    vae.decode(torch.randn(1, 4, family.latents, family.latents, dtype=dtype))
    return {"decode_gib": round(_peak() - before, 2)}


@torch.inference_mode()
def step(family: FamilyConfigs, dtype: torch.dtype) -> dict[str, Any]:
    """Return the peak GiB of resident memory of the UNet, and that a step of one guided image adds."""
    before = _peak()
    unet = _filled(UNet2DConditionModel, {**family.unet, "sample_size": family.latents}, dtype)
    with_unet = _peak()
    projection = KVProjection(unet)
    denoiser = Denoiser(unet, projection.slices)
    kv = projection(torch.randn(ROWS, 77, family.unet["cross_attention_dim"], dtype=dtype))
    more = {}
    if "addition_embed_type" in family.unet:
        more = {"pooled": torch.randn(ROWS, 1280, dtype=dtype), "sizes": torch.full((ROWS, 6), 1024.0)}
    sample = torch.randn(ROWS, 4, family.latents, family.latents, dtype=dtype)
    denoiser(sample, torch.full((ROWS,), 500.0), StepInputs(kv, **more))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "pixels": f"{family.latents * 8}x{family.latents * 8}",
        "rows": ROWS,
        "unet_gib": round(with_unet - before, 2),
        "step_gib": round(_peak() - with_unet, 2),
    }


def _filled(kind: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Fill tensors so that their memory is resident; the values do not matter."""
    with torch.device("meta"):
        model = kind(**config).to(dtype)
    model = model.to_empty(device="cpu").eval().requires_grad_(requires_grad=False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    return model


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


if __name__ == "__main__":
    main()
