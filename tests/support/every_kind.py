"""One adapter of each kind for a base, published, and random requests that mix them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from scumble.request import Adapter, Request, SchedulerName
from scumble_registry import Registry
from support.control_nets import load_unet, make_net, make_t2i_for, make_union
from support.tiny_hypernetwork import WebuiHypernetwork, make_predictor, save_predictor
from support.tiny_ip import make_image_encoder, make_ip_adapter
from support.tiny_sd import make_lora
from support.tiny_variant import make_checkpoint


@dataclass
class EveryKind:
    """`files` are what was published, by name; `pictures` what requests look at."""

    base: str
    files: dict[str, Path]
    pictures: dict[str, bytes] = field(default_factory=dict)


def publish_every_kind(registry: Registry, base: Path, folder: Path, *, image_side: int = 64) -> EveryKind:
    """`every/base` and an adapter of each kind for it, random but loud enough to be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    registry.publish(base, name="every/base")
    files = {"every/base": base, **_models(base, folder)}
    encoder = folder / "encoder"
    registry.publish(make_image_encoder(encoder), name="every/encoder")
    for name, path in files.items():
        if name != "every/base":
            looks = {"image_encoder": "every/encoder"} if name.startswith("ip/") else {}
            registry.publish(path, name=name, base="every/base", **looks)
    return EveryKind("every/base", files, _pictures(image_side))


def _models(base: Path, folder: Path) -> dict[str, Path]:
    unet = load_unet(base)
    width = int(unet.config.cross_attention_dim)
    torch.manual_seed(5)
    texts = text_widths(base)
    of_encoder = (
        {"<bad>": torch.randn(2, width)}
        if len(texts) == 1
        else dict(zip(("clip_l", "clip_g"), (torch.randn(2, each) for each in texts), strict=True))
    )
    save_file(of_encoder, folder / "<bad>.safetensors")
    nets = {
        "net/one": make_net(unet, 1),
        "net/two": make_net(unet, 2),
        "net/union": make_union(unet, 3),
        "net/t2i": make_t2i_for(unet, 4),
    }
    for name, net in nets.items():
        net.save_pretrained(folder / name)
    attentions = {name: layer for name, layer in unet.named_modules() if name.endswith(("attn1.to_k", "attn2.to_k"))}
    hyper = WebuiHypernetwork(sorted({layer.in_features for layer in attentions.values()}), seed=6, norm=True)
    targets = {f"unet.{name}": tuple(layer.weight.shape) for name, layer in attentions.items()}
    predictor = make_predictor(targets, texts[0], seed=7, gain=0.5, condition="text")
    return {
        "lora/small": make_lora(base, folder / "small", seed=1),
        "lora/full": make_lora(base, folder / "full", seed=2, rank=12, full=True),
        "lora/dora": make_lora(base, folder / "dora", seed=3, dora=True, text=False),
        "dream/dog": make_checkpoint(base, folder / "dog", seed=1, components=("unet", *TEXT_ENCODERS[: len(texts)])),
        "word/bad": folder / "<bad>.safetensors",
        "ip/base": make_ip_adapter(base, folder / "ip_base.safetensors", "base", seed=1, gain=3.0),
        "ip/plus": make_ip_adapter(base, folder / "ip_plus.safetensors", "plus", seed=2, gain=3.0, tokens=6),
        "hyper/context": hyper.save(folder / "context.safetensors"),
        "hyper/predictor": save_predictor(predictor, folder / "predictor.safetensors"),
        **{name: folder / name for name in nets},
    }


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def text_widths(base: Path) -> list[int]:
    """Of each text encoder that the base has."""
    configs = [base / name / "config.json" for name in TEXT_ENCODERS]
    return [int(json.loads(config.read_text())["hidden_size"]) for config in configs if config.is_file()]


def _pictures(side: int) -> dict[str, bytes]:
    found = {name: coarse_png(seed, side) for seed, name in enumerate(("red", "blue", "shape"))}
    halves = np.zeros((side, side), np.uint8)
    halves[:, : side // 2] = 255
    return found | {"left": _png(Image.fromarray(halves)), "right": _png(Image.fromarray(255 - halves))}


def coarse_png(seed: int, side: int = 64) -> bytes:
    """Colours large enough for an image encoder to see."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return _png(Image.fromarray(colours).resize((side, side)))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


PROMPTS = [
    ("a <bad> apple", "plain"),
    ("cat", "plain"),
    ("a red boat with a very long description of its sails, " * 3, "plain"),
    ("a (<bad>:1.3) [apple:pear:0.5]", "webui"),
    ("a [cat|dog] AND a boat BREAK with sails :0.7", "webui"),
]


def ways_to_ask(rng: random.Random) -> dict[str, dict[str, Any]]:
    """For each adapter one random way to ask for it."""
    start = rng.choice([0.0, 0.0, 0.3])
    part = {"start": start, "end": rng.choice([1.0, 1.0, 0.7])}
    weight = rng.choice([-0.3, 0.2, 0.4])
    masks: dict[str, Any] = rng.choice([{"images": ["red"]}, {"images": ["red", "blue"], "masks": ["left", "right"]}])
    return {
        "lora/small": {"weight": weight, **part, "blocks": rng.choice([None, {"mid_block": 0.2, "up_blocks.1": 1.5}])},
        "lora/full": {"weight": weight / 2, "text_weight": 0.5, **part},
        "lora/dora": {"weight": weight, **part},
        "dream/dog": {},
        "word/bad": {},
        "ip/base": {"weight": rng.choice([0.5, 1.0]), **masks, **part},
        "ip/plus": {"weight": 0.6, "image": "blue", "scale": rng.choice([None, {"up": {"block_1": [0.0, 1.2]}}])},
        "net/one": {"weight": 0.5, "image": "shape", "mode": rng.choice(["balanced", "guess", "prompt"]), **part},
        "net/two": {"weight": 0.3, "image": "shape", "preprocess": rng.choice([None, "invert", "canny"])},
        "net/union": {"weight": 0.4, "image": "shape", "control_type": "canny"},
        "net/t2i": {"weight": 1.0, "image": "shape", **part},
        "hyper/context": {"weight": weight, **part},
        "hyper/predictor": {"weight": weight, "text": rng.choice([None, "ink on paper"]), **part},
    }


def random_request(every: EveryKind, rng: random.Random, *, most: int = 5, **changes: Any) -> Request:
    """Up to `most` adapters of any kinds, on a random size, schedule and guidance."""
    ways = ways_to_ask(rng)
    names = rng.sample(sorted(ways), rng.randint(0, min(most, len(ways))))
    prompt, grammar = rng.choice(PROMPTS)
    return request_for(
        every,
        [{"ref": name, **ways[name]} for name in names],
        **{
            "prompt": prompt,
            "options": {"grammar": grammar},
            "negative_prompt": rng.choice([None, "<bad>"]),
            "seed": rng.randrange(2**31),
            "steps": rng.choice([4, 5, 6]),
            "scheduler": rng.choice(get_args(SchedulerName)),
            "guidance_scale": rng.choice([1.0, 5.0, 5.0]),
            "width": rng.choice([64, 64, 48]),
            "height": 64,
            **changes,
        },
    )


def request_for(every: EveryKind, adapters: list[dict[str, Any]], **fields: Any) -> Request:
    """With the pictures that these adapters name."""
    specs = [Adapter.model_validate(adapter) for adapter in adapters]
    named = {name for spec in specs for name in (*spec.images, *spec.masks)}
    images = {name: every.pictures[name] for name in sorted(named)}
    return Request.parse({"adapters": specs, "images": images, **fields})
