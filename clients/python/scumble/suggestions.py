"""The right name for a field that a request does not have: what other programs call it, or the nearest spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

ELSEWHERE = {
    "adapter": "adapters",
    "lora": "adapters",
    "loras": "adapters",
    "controlnet": "adapters",
    "ip_adapter": "adapters",
    "embeddings": "adapters",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "sampler_index": "scheduler",
    "n": "num_images",
    "batch_size": "num_images",
    "num_images_per_prompt": "num_images",
    "size": "width and height",
    "model": "base",
    "checkpoint": "base",
    "init_image": "options.image",
    "init_images": "options.image",
    "mask_image": "options.mask",
    "denoising_strength": "options.strength",
    "name": "ref",
    "path": "ref",
    "alpha": "weight",
    "strength": "weight",
    "lora_scale": "weight",
    "te_weight": "text_weight",
    "clip_weight": "text_weight",
    "timestep_range": "start and end",
}
"""What diffusers, the webui, ComfyUI and OpenAI's API say → what it is here."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the right name for `name`, of `known`; None if none is near. `options.eta` is known as `eta` too.

    >>> nearest("num_inference_steps", ["prompt", "steps"])
    'steps'
    >>> nearest("strenght", ["steps", "options.strength"])
    'options.strength'
    """
    by_name = {each.rpartition(".")[2]: each for each in reversed([*known])}
    lower = name.lower()
    if lower in by_name:
        return by_name[lower]
    right = ELSEWHERE.get(lower)
    if right and all(part.rpartition(".")[2] in by_name for part in right.split(" and ")):
        return right
    close = get_close_matches(lower, by_name, 1)
    return by_name[close[0]] if close else None


def unknown(name: str, known: Iterable[str]) -> str:
    """Say that a field is unknown, and which one may be meant."""
    known = [*known]
    right = nearest(name, known)
    return f"is unknown; did you mean {right}?" if right else f"is unknown; there are {', '.join(known)}"
