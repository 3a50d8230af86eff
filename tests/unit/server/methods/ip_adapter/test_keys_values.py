"""A request with IP-Adapters equals diffusers' own pipeline with `load_ip_adapter`; strangers do not meet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble.errors import InvalidRequest, Refused
from scumble.receipt import DroppedAdapter
from scumble.request import Adapter, Request
from scumble_build.graphs.vision import EncodedPictures, ImageEncoder
from scumble_registry import Registry
from support.tiny_ip import FACE, make_image_encoder, make_ip_adapter

TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}

ENTRIES: dict[str, dict[str, Any]] = {
    "ip/base": {"kind": "base", "gain": 3.0, "seed": 1},
    "ip/other": {"kind": "base", "gain": 3.0, "seed": 2, "tokens": 4},
    "ip/full": {"kind": "full", "gain": 3.0, "seed": 3},
    "ip/plus": {"kind": "plus", "gain": 3.0, "seed": 4, "tokens": 6},
    "ip/faceid": {"kind": "faceid", "gain": 3.0, "seed": 5, "lora": 4},
    "ip/portrait": {"kind": "faceid", "gain": 3.0, "seed": 6, "tokens": 16},
    "ip/face-plus": {"kind": "faceid_plus", "gain": 3.0, "seed": 7, "lora": 4},
    "ip/face-plusv2": {"kind": "faceid_plus", "gain": 3.0, "seed": 7, "lora": 4},
}


def png(seed: int, size: tuple[int, int]) -> bytes:
    """Coarse colours, so that the encoder sees them."""
    draw = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(draw).resize(size).save(out, "PNG")
    return out.getvalue()


def mask(width: int, height: int, left: float, right: float) -> bytes:
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, int(left * width) : int(right * width)] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


PICTURES = {
    "red": png(1, (50, 70)),
    "blue": png(2, (64, 40)),
    "left": mask(64, 64, 0, 0.5),
    "right": mask(64, 64, 0.5, 1),
    "wide": mask(200, 90, 0.2, 0.8),
}
FACES = {
    "face": np.random.default_rng(3).normal(size=FACE).astype(np.float32),
    "faces": np.random.default_rng(4).normal(size=(2, FACE)).astype(np.float32),
}


def request(*adapters: dict[str, Any], **changes: Any) -> Request:
    specs = [Adapter.model_validate(adapter) for adapter in adapters]
    named = {name for spec in specs for name in (*spec.images, *spec.masks)}
    images = {name: content for name, content in PICTURES.items() if name in named}
    tensors = {name: values for name, values in FACES.items() if name in named}
    return Request.parse({**PLAIN, "adapters": specs, "images": images, "tensors": tensors, **changes})


BASE = {"ref": "ip/base", "image": "red"}
OTHER = {"ref": "ip/other", "image": "blue"}
BOTH = {"images": ["red", "blue"]}
HALVES = {**BOTH, "masks": ["left", "right"]}

CASES: dict[str, Request] = {
    "base": request(BASE),
    "no guidance": request(BASE, guidance_scale=1.0),
    "weight": request({**BASE, "weight": 0.6}),
    "negative weight": request({**BASE, "weight": -0.5}),
    "several images": request(BASE, num_images=2),
    "full": request({"ref": "ip/full", "image": "red"}),
    "plus": request({"ref": "ip/plus", "image": "red"}),
    "plus without guidance": request({"ref": "ip/plus", "image": "red"}, guidance_scale=1.0),
    "two pictures": request({"ref": "ip/base", **BOTH}),
    "two pictures, plus": request({"ref": "ip/plus", **BOTH, "weight": 0.7}),
    "two adapters": request({**BASE, "weight": 0.7}, {**OTHER, "weight": 0.5}),
    "two adapters of other lengths": request({**BASE, "weight": 0.7}, {"ref": "ip/plus", **BOTH, "weight": 0.4}),
    "masks": request({"ref": "ip/base", **HALVES}),
    "a mask of another size": request({**BASE, "mask": "wide"}),
    "masks, not square": request({"ref": "ip/plus", **HALVES}, width=96, height=64),
    "a masked adapter beside another": request({"ref": "ip/plus", **HALVES}, {**OTHER, "weight": 0.5}),
    "scales by picture": request({"ref": "ip/base", **HALVES, "scale": [0.9, 0.3]}),
    "scales by layer": request({**BASE, "scale": {"down": {"block_0": 0.4}, "up": {"block_1": [0.0, 1.2]}}}),
    "scales by layer and picture": request(
        {"ref": "ip/base", **HALVES, "scale": {"mid": 0.5, "up": {"block_1": [[1.0, 0.2], [0.0, 1.0]]}}}
    ),
    "start and end": request({**BASE, "start": 0.3}, {**OTHER, "start": 0.1, "end": 0.55}, steps=10),
    "end of all": request({**BASE, "end": 0.5}),
    "faceid": request({"ref": "ip/faceid", "image": "face"}),
    "faceid at another weight": request({"ref": "ip/faceid", "image": "face", "weight": 0.4}),
    "faceid with start": request({"ref": "ip/faceid", "image": "face", "start": 0.4}),
    "portrait of two faces": request({"ref": "ip/portrait", "image": "faces"}),
    "faceid plus": request({"ref": "ip/face-plus", "images": ["red", "face"]}),
    "faceid plus v2": request({"ref": "ip/face-plusv2", "images": ["face", "red"]}),
    "faceid plus of two": request({"ref": "ip/face-plusv2", "images": ["red", "blue", "faces"]}),
    "beside a lora": request({**BASE, "weight": 0.7}, {"ref": "l/a", "weight": 0.3}),
    "faceid beside a lora": request({"ref": "ip/faceid", "image": "face"}, {"ref": "l/a", "weight": 0.3}),
}


@dataclass
class World:
    running: Any
    base: Path
    files: dict[str, Path]
    encoder: Path


@pytest.fixture(scope="module")
def world(
    tiny_base: Path,
    make_lora: Callable[..., Path],
    start: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """`ip/plus` brings its image encoder, the others name the same one."""
    folder = tmp_path_factory.mktemp("ip")
    encoder = make_image_encoder(folder / "encoder", preparation=True)
    files = {"l/a": make_lora(tiny_base, folder / "lora", seed=1)}
    with Registry.open(folder / "home", create=True) as registry:
        registry.publish(tiny_base, "tiny/base")
        registry.publish(encoder, "vision/vit")
        registry.publish(files["l/a"], "l/a", base="tiny/base")
        for name, how in ENTRIES.items():
            entry = folder / name.partition("/")[2]
            files[name] = make_ip_adapter(tiny_base, entry / f"{entry.name}.safetensors", **how)
            if name == "ip/plus":
                make_image_encoder(entry / "image_encoder", preparation=True)
                registry.publish(entry, name, base="tiny/base")
            else:
                named = "vision/vit" if how["kind"] != "faceid" else None
                registry.publish(files[name], name, base="tiny/base", image_encoder=named)
    running = start(folder / "home", "tiny/base", files)
    yield World(running, tiny_base, files, encoder)
    running.service.close()


def picture(name: str) -> Image.Image:
    return Image.open(io.BytesIO(PICTURES[name]))


def diffusers_alone(world: World, asked: Request) -> torch.Tensor:
    """Latents of diffusers' own pipeline and IP-Adapter loader; its callback sets the scales of the next step."""
    pipeline = StableDiffusionPipeline.from_pretrained(world.base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_pretrained(world.base / "scheduler")
    pipeline.register_modules(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(world.encoder).eval(),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(world.encoder),
    )
    specs = [spec for spec in asked.adapters if spec.ref.startswith("ip/")]
    loras = [spec for spec in asked.adapters if not spec.ref.startswith("ip/")]
    arguments: dict[str, Any] = {}
    if specs:
        files = [world.files[spec.ref] for spec in specs]
        pipeline.load_ip_adapter(
            [str(file.parent) for file in files],
            subfolder=[""] * len(files),
            weight_name=[file.name for file in files],
            image_encoder_folder=None,
        )
        arguments |= _looked_at(pipeline, specs, asked)
    for spec in loras:
        pipeline.load_lora_weights(world.files[spec.ref], adapter_name="lora")
    before_next = _before_next(pipeline, specs, loras, asked.steps or 0)
    before_next(pipeline, -1, None, {})
    with torch.inference_mode():
        count = asked.num_images
        found: torch.Tensor = pipeline(
            prompt=asked.prompt,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            width=asked.width,
            height=asked.height,
            num_images_per_prompt=count,
            generator=[torch.Generator("cpu").manual_seed((asked.seed or 0) + i) for i in range(count)],
            output_type="latent",
            callback_on_step_end=before_next,
            **arguments,
        ).images
    return found


def _looked_at(pipeline: StableDiffusionPipeline, specs: list[Adapter], asked: Request) -> dict[str, Any]:
    guided = (asked.guidance_scale or 0) > 1
    arguments: dict[str, Any] = {}
    if any(name in FACES for spec in specs for name in spec.images):
        (spec,) = specs
        faces = torch.from_numpy(np.concatenate([np.atleast_2d(FACES[n]) for n in spec.images if n in FACES]))[None]
        arguments["ip_adapter_image_embeds"] = [torch.cat([torch.zeros_like(faces), faces]) if guided else faces]
        if "face-plus" in spec.ref:
            pictures = [picture(name) for name in spec.images if name in PICTURES]
            layer = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
            layer.clip_embeds = pipeline.prepare_ip_adapter_image_embeds([pictures], None, "cpu", 1, guided)[0]
            layer.shortcut = spec.ref.endswith("v2")
    else:
        arguments["ip_adapter_image"] = [[picture(name) for name in spec.images] for spec in specs]
    if any(spec.masks for spec in specs):
        masks = []
        for spec in specs:
            prepared = [
                IPAdapterMaskProcessor().preprocess([picture(name)], height=asked.height, width=asked.width)[0]
                for name in spec.masks
            ]
            masks.append(torch.stack(prepared, 1) if prepared else None)
        arguments["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    return arguments


def _before_next(
    pipeline: StableDiffusionPipeline, specs: list[Adapter], loras: list[Adapter], steps: int
) -> Callable[..., dict[str, Any]]:
    def scaled(scale: Any, weight: float) -> Any:
        if isinstance(scale, dict):
            return {name: scaled(value, weight) for name, value in scale.items()}
        return [scaled(value, weight) for value in scale] if isinstance(scale, tuple) else scale * weight

    def before_next(_pipeline: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        now = [spec.weight if spec.is_active(step + 1, steps) else 0.0 for spec in specs]
        if specs:
            given = [1.0 if spec.scale is None else spec.scale for spec in specs]
            pipeline.set_ip_adapter_scale([scaled(scale, weight) for scale, weight in zip(given, now, strict=True)])
        names = [("faceid_0", now[0])] if any("ip/face" in spec.ref for spec in specs) else []
        names += [("lora", spec.weight) for spec in loras]
        if names and step < 0:
            pipeline.set_adapters(*map(list, zip(*names, strict=True)))
        for module in pipeline.unet.modules():
            if isinstance(module, BaseTunerLayer):
                for name, weight in names:
                    module.set_scale(name, weight)
        return state

    return before_next


@pytest.fixture(scope="module")
def bare(world: World) -> Callable[[Request], torch.Tensor]:
    """The same request without its adapters, drawn once for all that share it."""
    found: dict[str, torch.Tensor] = {}

    def draw(asked: Request) -> torch.Tensor:
        plain = asked.model_copy(update={"adapters": (), "images": {}, "tensors": {}})
        key = plain.model_dump_json()
        if key not in found:
            found[key] = diffusers_alone(world, plain)
        return found[key]

    return draw


@pytest.mark.every_executor
@pytest.mark.parametrize("name", CASES)
def test_alone_equals_diffusers(world: World, bare: Callable[[Request], torch.Tensor], name: str) -> None:
    ours = world.running.run([CASES[name]])[0]
    reference = diffusers_alone(world, CASES[name])
    assert (ours.latents - reference).abs().max() <= TOLERANCE
    assert (reference - bare(CASES[name])).abs().max() >= VISIBLE, "the oracle shows nothing"


@pytest.mark.every_executor
def test_strangers_in_a_batch_are_each_as_alone(world: World) -> None:
    names = ["base", "two pictures, plus", "masks", "faceid", "faceid plus v2", "scales by layer", "no guidance"]
    mixed = [CASES[name].model_copy(update={"seed": 50 + i}) for i, name in enumerate(names)]
    mixed.append(request(seed=99))
    before = world.running.service.stats().mixed_steps
    together = world.running.run(mixed)
    assert world.running.service.stats().mixed_steps > before
    for one, alone in zip(together, (world.running.run([each])[0] for each in mixed), strict=True):
        assert (one.latents - alone.latents).abs().max() <= 1e-4


def test_blocks_are_scales_under_other_names(world: World) -> None:
    by_block = request({**BASE, "blocks": {"down_blocks.0": 0.4, "mid_block": 0.0, "up_blocks.1": 0.7}})
    by_layer = request({**BASE, "scale": {"down": 0.4, "up": 0.7}})
    first, second = (world.running.run([each])[0].latents for each in (by_block, by_layer))
    assert torch.allclose(first, second, atol=1e-5)
    assert not torch.allclose(first, world.running.run([CASES["base"]])[0].latents, atol=VISIBLE)


@pytest.mark.parametrize("ref", ["ip/base", "ip/faceid"])
def test_weight_zero_is_the_base_and_dropped(world: World, ref: str) -> None:
    """Also FaceID's LoRA, which diffusers keeps."""
    looked = "face" if ref == "ip/faceid" else "red"
    off = world.running.run([request({"ref": ref, "image": looked, "weight": 0.0})])[0]
    assert torch.equal(off.latents, world.running.run([request()])[0].latents)
    assert off.done.receipt.dropped == (DroppedAdapter(ref=ref, reason="weight 0"),)


def test_the_receipt_says_what_was_looked_at(world: World) -> None:
    receipt = world.running.run([CASES["masks"]])[0].done.receipt
    (adapter,) = receipt.adapters
    digests = {name: entry.digest for name, entry in receipt.request.images.items()}
    assert adapter.kind == "ip_adapter"
    assert adapter.details["projection"] == "base"
    assert adapter.details["pictures"] == [digests["red"], digests["blue"]]
    assert adapter.details["masks"] == [digests["left"], digests["right"]]
    with Registry.open(world.running.home) as registry:
        assert adapter.details["image_encoder"] == registry.find("vision/vit").digest
    (plus,) = world.running.run([CASES["plus"]])[0].done.receipt.adapters
    assert plus.details["image_encoder"] == "entry"
    (face,) = world.running.run([CASES["faceid"]])[0].done.receipt.adapters
    assert (face.details["image_encoder"], face.details["rank"]) == (None, 4)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"ref": "ip/base"}, "needs a picture"),
        ({"ref": "ip/base", "image": "face"}, "reads pictures, not embeddings"),
        ({"ref": "ip/faceid", "image": "red"}, "needs the embedding of a face"),
        ({"ref": "ip/faceid"}, "needs the embedding of a face"),
        ({"ref": "ip/faceid", "images": ["red", "face"]}, "reads embeddings of faces, not pictures"),
        ({"ref": "ip/face-plus", "image": "face"}, "needs a picture"),
        ({"ref": "ip/face-plus", "images": ["face", "red", "blue"]}, "2 pictures and 1 embeddings"),
        ({"ref": "ip/base", "image": "red", "masks": ["left", "right"]}, "2 masks for 1 pictures"),
        ({"ref": "ip/base", **BOTH, "mask": "left"}, "1 masks for 2 pictures"),
        ({"ref": "ip/base", **BOTH, "scale": [1.0, 0.5]}, "needs a mask for each"),
        ({"ref": "ip/base", "image": "red", "scale": {"up": {"block_0": 1}}}, r"no up\.block_0"),
        ({"ref": "ip/base", "image": "red", "mode": "guess"}, "mode means nothing"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_at_the_edge(world: World, adapter: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        world.running.run([request(adapter)])


def test_an_embedding_of_another_width_is_refused(world: World) -> None:
    asked = request({"ref": "ip/faceid", "image": "face"}, tensors={"face": np.ones(FACE + 1, np.float32)})
    with pytest.raises(InvalidRequest, match=rf"shape \({FACE + 1},\); ip/faceid reads \({FACE},\)"):
        world.running.run([asked])


def test_where_the_image_encoder_is_looked_for(
    make_tiny_base: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    """The base's own serves whoever fits it; without one, or with one that does not fit, the edge says what to do."""
    bare_base = make_tiny_base(tmp_path / "bare")
    rich = make_tiny_base(tmp_path / "rich")
    make_image_encoder(rich / "image_encoder")
    CLIPImageProcessorPil(size=32, crop_size=32, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        rich / "feature_extractor"
    )
    encoder = make_image_encoder(tmp_path / "same", preparation=True)
    fits = make_ip_adapter(rich, tmp_path / "fits.safetensors", "base", gain=3.0)
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(bare_base, "tiny/bare")
        registry.publish(rich, "tiny/rich")
        registry.publish(encoder, "vision/vit")
        registry.publish(fits, "ip/base", base="tiny/rich")
        registry.publish(fits, "ip/named", base="tiny/rich", image_encoder="vision/vit")
    asked = request(BASE)
    running = start(tmp_path / "home", "tiny/rich", {})
    try:
        own = running.run([asked])[0]
        named = running.run([request({"ref": "ip/named", "image": "red"})])[0]
        assert own.done.receipt.adapters[0].details["image_encoder"] == "base"
        assert torch.allclose(own.latents, named.latents, atol=1e-5), "the same weights, prepared alike"
        with Registry.open(tmp_path / "home") as registry:
            registry.set_status("vision/vit@1", "quarantined")
        running.service.close()
        running = start(tmp_path / "home", "tiny/rich", {})
        with pytest.raises(Refused, match="quarantined"):
            running.run([request({"ref": "ip/named", "image": "red"})])
    finally:
        running.service.close()
    make_image_encoder(rich / "image_encoder", embedding=16)
    with Registry.open(tmp_path / "home") as registry:
        registry.publish(rich, "tiny/narrow")
    for base, says in (
        ("bare", "and so does the base tiny/bare@1"),
        ("narrow", "and that of the base tiny/narrow@1 does not fit .*width 40, but this image encoder gives 16"),
    ):
        running = start(tmp_path / "home", f"tiny/{base}", {})
        try:
            with pytest.raises(Refused, match=f"comes without an image encoder, {says}"):
                running.run([asked])
        finally:
            running.service.close()


def test_a_picture_is_encoded_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else of the request changes; only what the negative prompt looks at is encoded beside it."""
    looked: list[int] = []
    encode = ImageEncoder._run

    def counted(encoder: ImageEncoder, prepared: torch.Tensor) -> EncodedPictures:
        looked.append(len(prepared))
        return encode(encoder, prepared)

    monkeypatch.setattr(ImageEncoder, "_run", counted)
    fresh = {"images": {"red": png(77, (40, 40))}}
    world.running.run([request({"ref": "ip/full", "image": "red"}, **fresh)])
    first = len(looked)
    assert first in {1, 2}
    for other in ({"weight": 0.5}, {"scale": {"mid": 1.0}}, {"end": 0.5}):
        world.running.run([request({"ref": "ip/full", "image": "red", **other}, **fresh, seed=3)])
    assert len(looked) == first


def test_lower_precision_draws_the_same_in_rough(world: World, start: Callable[..., Any]) -> None:
    """Encoder, adapter and keys and values are in the server's precision; nothing meets another dtype."""
    names = ["plus", "masks", "faceid plus v2", "two adapters of other lengths"]
    rough = start(world.running.home, "tiny/base", {}, precision="bf16")
    try:
        for one, name in zip(rough.run([CASES[name] for name in names]), names, strict=True):
            exact = world.running.run([CASES[name]])[0].latents
            assert (one.latents - exact).abs().mean() <= 0.2 * exact.abs().mean()
    finally:
        rough.service.close()
