"""Every kind alone, the field's best practice, and nearly everything at once, against diffusers' own pipeline.

On a tiny random base of each family and on the bundled one.

diffusers has no hypernetworks, and several LoRAs beside a DoRA it does not add up (see test_dora.py): the first are
put before the keys and values of its attentions, the DoRA is merged into its weights, by the written formulas. Union
nets have no pipeline for SD 1.x; test_controlnet.py has them alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble.request import Adapter, Request
from scumble_registry import Registry
from support.every_kind import EveryKind, publish_every_kind, request_for
from support.oracle import changed_weights, diffusers_scheduler
from support.places import DEMO_BASE
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_hypernetwork import WebuiHypernetwork

if TYPE_CHECKING:
    from support.running import Running

PIPELINES = {
    (False, False): StableDiffusionPipeline,
    (False, True): StableDiffusionControlNetPipeline,
    (True, False): StableDiffusionXLPipeline,
    (True, True): StableDiffusionXLControlNetPipeline,
}
"""By: is it SDXL, has it nets."""
TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
SCHEDULERS = ("ddim", "euler_a", "dpmpp_2m_karras", "unipc")
SEEN_AMONG_OTHERS = 10 * TOLERANCE
PLAIN = {"seed": 7, "steps": 10, "guidance_scale": 5.0, "width": 64, "height": 64}


@pytest.fixture(scope="module", params=["tiny", "demo", "sd2", "sdxl"])
def world(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., Running],
) -> Iterator[tuple[Running, EveryKind]]:
    home = tmp_path_factory.mktemp("everything")
    with Registry.open(home, create=True) as registry:
        folder = tmp_path_factory.mktemp("kinds")
        makers = {
            "tiny": lambda: tiny_base,
            "demo": lambda: DEMO_BASE,
            "sd2": lambda: make_tiny_sd2(folder / "base"),
            "sdxl": lambda: make_tiny_sdxl(folder / "base"),
        }
        every = publish_every_kind(registry, makers[request.param](), folder / "kinds")
    running = start(home, every.base, every.files)
    yield running, every
    running.service.close()


EVERYTHING: list[dict[str, Any]] = [
    {"ref": "dream/dog"},
    {"ref": "lora/small", "weight": 0.3, "text_weight": 0.5, "start": 0.3},
    {"ref": "lora/full", "weight": -0.1, "end": 0.55},
    {"ref": "lora/dora", "weight": 0.4},
    {"ref": "word/bad"},
    {"ref": "ip/base", "weight": 0.7, "images": ["red", "blue"], "masks": ["left", "right"]},
    {"ref": "ip/plus", "weight": 0.8, "image": "blue", "start": 0.2},
    {"ref": "net/one", "weight": 0.5, "image": "shape", "end": 0.7},
    {"ref": "net/two", "weight": 0.3, "image": "red"},
    {"ref": "net/t2i", "weight": 12.0, "image": "shape"},
    {"ref": "hyper/context", "weight": 1.0},
]
MIXES: dict[str, list[dict[str, Any]]] = {
    "style by IP-Adapter, shape by ControlNet": [
        {"ref": "ip/base", "weight": 0.8, "image": "red"},
        {"ref": "net/one", "weight": 0.9, "image": "shape"},
    ],
    "a scheduled LoRA on keys and values": [{"ref": "lora/small", "weight": 0.5, "start": 0.2, "end": 0.6}],
    "everything": EVERYTHING,
    **{adapter["ref"]: [adapter] for adapter in EVERYTHING},
}


@pytest.mark.every_executor
@pytest.mark.parametrize("name", MIXES)
def test_it_equals_diffusers(world: tuple[Running, EveryKind], name: str) -> None:
    running, every = world
    words = any(adapter["ref"] == "word/bad" for adapter in MIXES[name])
    prompts = {"prompt": "a <bad> apple", "negative_prompt": "<bad>"} if words else {"prompt": "an apple"}
    scheduler = SCHEDULERS[sorted(MIXES).index(name) % len(SCHEDULERS)]
    asked = request_for(every, MIXES[name], **PLAIN, **prompts, scheduler=scheduler)
    ours = running.run([asked])[0].latents
    theirs = by_diffusers(every, asked)
    assert (ours - theirs).abs().max() <= TOLERANCE
    for spec in asked.adapters:
        rest = [adapter for adapter in MIXES[name] if adapter["ref"] != spec.ref]
        without = running.run([request_for(every, rest, **PLAIN, **prompts, scheduler=scheduler)])[0].latents
        least = VISIBLE if len(asked.adapters) == 1 else SEEN_AMONG_OTHERS
        assert (without - theirs).abs().max() >= least, f"{spec.ref} is seen"


def by_diffusers(every: EveryKind, asked: Request) -> Tensor:
    specs = {spec.ref: spec for spec in asked.adapters}
    folder = every.files["dream/dog" if "dream/dog" in specs else "every/base"]
    nets = [spec for spec in asked.adapters if spec.ref in {"net/one", "net/two"}]
    is_xl = (folder / "text_encoder_2").is_dir()
    kind: Any = PIPELINES[is_xl, bool(nets)]
    models = [ControlNetModel.from_pretrained(every.files[spec.ref], local_files_only=True) for spec in nets]
    pipeline = kind.from_pretrained(folder, local_files_only=True, **({"controlnet": models} if nets else {}))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers_scheduler(asked, DDIMScheduler.load_config(folder / "scheduler"))
    arguments = looked_at(pipeline, every, asked)
    loras = [spec for spec in asked.adapters if spec.ref in {"lora/small", "lora/full"}]
    load(pipeline, every, specs, loras)
    if nets:
        arguments |= {
            "image": [picture(every, spec.images[0]) for spec in nets],
            "controlnet_conditioning_scale": [spec.weight for spec in nets],
            "control_guidance_start": [spec.start for spec in nets],
            "control_guidance_end": [spec.end for spec in nets],
        }

    def before_next(pipe: Any, step: int, _timestep: object, state: dict[str, Any]) -> dict[str, Any]:
        for spec in loras:
            for module in pipe.unet.modules():
                if isinstance(module, BaseTunerLayer):
                    active = spec.is_active(step + 1, asked.steps or 0)
                    module.set_scale(spec.ref.replace("/", "_"), spec.weight if active else 0.0)
        set_scales(pipe, asked, step + 1)
        return state

    before_next(pipeline, -1, None, {})
    with torch.inference_mode():
        latents: Tensor = pipeline(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            width=asked.width,
            height=asked.height,
            generator=torch.Generator("cpu").manual_seed(asked.seed or 0),
            output_type="latent",
            callback_on_step_end=before_next,
            **arguments,
        ).images
    return latents


def load(pipeline: Any, every: EveryKind, specs: dict[str, Adapter], loras: list[Adapter]) -> None:
    """Everything but pictures and nets; the DoRA first, while the weights have their own names."""
    if "lora/dora" in specs:
        merge_dora(pipeline, every.files["lora/dora"], specs["lora/dora"].weight)
    if "word/bad" in specs:
        load_word(pipeline, load_file(every.files["word/bad"]))
    for spec in loras:
        pipeline.load_lora_weights(every.files[spec.ref], adapter_name=spec.ref.replace("/", "_"))
    if loras:
        texts = [name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components]
        weights = [{"unet": spec.weight, **dict.fromkeys(texts, text_weight(spec))} for spec in loras]
        pipeline.set_adapters([spec.ref.replace("/", "_") for spec in loras], weights)
    if "hyper/context" in specs:
        put_before_keys_and_values(pipeline.unet, specs["hyper/context"].weight)
    if "net/t2i" in specs:
        add_features(pipeline, every, specs["net/t2i"])


def load_word(pipeline: Any, tensors: dict[str, Tensor]) -> None:
    if "<bad>" in tensors:
        pipeline.load_textual_inversion(tensors, token="<bad>")
        return
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(tensors[name], token="<bad>", text_encoder=encoder, tokenizer=tokenizer)


def text_weight(spec: Adapter) -> float:
    return spec.weight if spec.text_weight is None else spec.text_weight


def picture(every: EveryKind, name: str) -> Image.Image:
    return Image.open(io.BytesIO(every.pictures[name])).convert("RGB")


def merge_dora(pipeline: Any, file: Path, strength: float) -> None:
    for weight, changed in list(changed_weights(pipeline, load_file(file))):
        weight.data += strength * (changed - weight.detach())


def looked_at(pipeline: Any, every: EveryKind, asked: Request) -> dict[str, Any]:
    """diffusers' own IP-Adapter loader; the pictures, and masks where one adapter has them."""
    specs = [spec for spec in asked.adapters if spec.ref.startswith("ip/")]
    if not specs:
        return {}
    encoder = every.files["ip/base"].parent / "encoder"
    pipeline.register_modules(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder).eval(),
        feature_extractor=CLIPImageProcessorPil(size=32, crop_size=32),
    )
    files = [every.files[spec.ref] for spec in specs]
    pipeline.load_ip_adapter(
        [str(file.parent) for file in files],
        subfolder=[""] * len(files),
        weight_name=[file.name for file in files],
        image_encoder_folder=None,
    )
    pictures = [[picture(every, name) for name in spec.images] for spec in specs]
    arguments: dict[str, Any] = {"ip_adapter_image": pictures}
    if any(spec.masks for spec in specs):
        processor = IPAdapterMaskProcessor()
        white = Image.new("L", (64, 64), 255)
        masks = []
        for spec in specs:
            shown = [picture(every, name) for name in spec.masks] or [white] * len(spec.images)
            ready = processor.preprocess(shown, height=64, width=64)
            masks.append(ready.reshape(1, ready.shape[0], ready.shape[2], ready.shape[3]))
        arguments["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    return arguments


def set_scales(pipeline: Any, asked: Request, step: int) -> None:
    specs = [spec for spec in asked.adapters if spec.ref.startswith("ip/")]
    if specs:
        scales: list[Any] = []
        for spec in specs:
            scale = spec.weight if spec.is_active(step, asked.steps or 0) else 0.0
            scales.append([scale] * len(spec.images) if spec.masks else scale)
        pipeline.set_ip_adapter_scale(scales)


def put_before_keys_and_values(unet: Any, strength: float) -> None:
    """context → context + strength · network(context), as FORMATS writes it, in every attention."""
    attentions = [layer for name, layer in unet.named_modules() if name.endswith(("attn1", "attn2"))]
    network = WebuiHypernetwork(sorted({layer.to_k.in_features for layer in attentions}), seed=6, norm=True)

    def changed(side: int) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
        return lambda _layer, arguments: (network(arguments[0], arguments[0], strength)[side],)

    for layer in attentions:
        layer.to_k.register_forward_pre_hook(changed(0))
        layer.to_v.register_forward_pre_hook(changed(1))


def add_features(pipeline: Any, every: EveryKind, spec: Adapter) -> None:
    model = T2IAdapter.from_pretrained(every.files[spec.ref], local_files_only=True)
    pixels = pipeline.image_processor.pil_to_numpy(picture(every, spec.images[0]))
    with torch.inference_mode():
        features = [spec.weight * each for each in model(torch.from_numpy(pixels).permute(0, 3, 1, 2))]
    forward = pipeline.unet.forward

    def with_features(*arguments: Any, **more: Any) -> Any:
        more["down_intrablock_additional_residuals"] = [torch.cat([each] * 2) for each in features]
        return forward(*arguments, **more)

    pipeline.unet.forward = with_features
