"""Hypernetworks that predict a LoRA: a request equals diffusers with the same factors loaded as a PEFT LoRA."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from scumble.errors import Incompatible, InvalidRequest, Refused
from scumble.receipt import DroppedAdapter
from scumble.request import Adapter, Request
from scumble_build.graphs.predictor import Predictor
from scumble_build.graphs.vision import ImageEncoder
from scumble_registry import Registry
from support.tiny_hypernetwork import make_predictor, save_predictor
from support.tiny_ip import STATES, make_image_encoder
from support.tiny_variant import make_checkpoint

pytestmark = pytest.mark.every_executor
TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
TEXT = 32


def png(seed: int, size: tuple[int, int]) -> bytes:
    draw = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(draw).resize(size).save(out, "PNG")
    return out.getvalue()


PICTURES = {"red": png(1, (50, 70)), "blue": png(2, (64, 40))}


def request(*adapters: dict[str, Any], **changes: Any) -> Request:
    specs = [Adapter.model_validate(each) for each in adapters]
    images = {name: PICTURES[name] for spec in specs for name in spec.images}
    return Request.parse({**PLAIN, "adapters": specs, "images": images, **changes})


RED = {"ref": "p/image", "image": "red"}
BLUE = {"ref": "p/image", "image": "blue"}

CASES: dict[str, Request] = {
    "picture": request(RED),
    "another picture": request(BLUE),
    "weight and text weight": request({**RED, "weight": -0.5, "text_weight": 0.7}),
    "start and end": request({**RED, "start": 0.2, "end": 0.7, "text_weight": 0.0}, steps=10),
    "several images": request({**RED, "weight": 0.6}, num_images=2),
    "the prompt": request({"ref": "p/text"}),
    "a text of its own": request({"ref": "p/text", "text": "ink on paper"}),
    "an empty text": request({"ref": "p/text", "text": ""}),
    "one predictor, two pictures": request({**RED, "weight": 0.5}, {**BLUE, "weight": 0.4}),
    "more columns than factors may have": request({**RED, "ref": "p/wide"}, {**BLUE, "ref": "p/wide", "end": 0.5}),
    "beside a lora": request({**RED, "weight": 0.5}, {"ref": "l/a", "weight": 0.3}, {"ref": "p/text", "weight": 0.4}),
}


@dataclass
class World:
    running: Any
    base: Path
    lora: Path
    checkpoint: Path
    predictors: dict[str, Predictor]


def targets_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Attention, a 1x1 convolution and the text encoder."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    found = {}
    for prefix, model in (("unet.", pipeline.unet), ("text_encoder.text_model.", pipeline.text_encoder)):
        for name, module in model.named_modules():
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "q_proj")):
                found[prefix + name.removeprefix("text_model.")] = tuple(module.weight.shape)
    return found


@pytest.fixture(scope="module")
def world(
    tiny_base: Path,
    make_lora: Callable[..., Path],
    start: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("predictors")
    base = Path(shutil.copytree(tiny_base, folder / "base"))
    make_image_encoder(base / "image_encoder")
    lora = make_lora(base, folder / "lora", seed=1)
    checkpoint = make_checkpoint(base, folder / "dog", seed=1, components=("unet", "text_encoder"))
    targets = targets_of(base)
    encoder = hashlib.sha256((base / "image_encoder/model.safetensors").read_bytes()).hexdigest()
    predictors = {
        "p/image": make_predictor(targets, STATES, seed=1, gain=0.5, encoder=f"sha256:{encoder}"),
        "p/text": make_predictor(targets, TEXT, seed=2, gain=0.5, condition="text"),
        "p/wide": make_predictor(targets, STATES, seed=3, gain=0.02, rank=200, alpha=200.0),
        "p/other-encoder": make_predictor(targets, STATES, encoder="sha256:" + "0" * 64),
        "p/other-width": make_predictor(targets, STATES + 8),
        "p/loud": make_predictor(targets, STATES, gain=1e38),
    }
    with Registry.open(folder / "home", create=True) as registry:
        registry.publish(base, "tiny/base")
        registry.publish(lora, "l/a", base="tiny/base")
        registry.publish(checkpoint, "my/dog", base="tiny/base")
        for name, each in predictors.items():
            registry.publish(save_predictor(each, folder / f"{name}.safetensors"), name, base="tiny/base")
    running = start(folder / "home", "tiny/base", {})
    yield World(running, base, lora, checkpoint, predictors)
    running.service.close()


def states_of(base: Path, adapter: Adapter, prompt: str) -> Tensor:
    """What the predictor reads, by transformers' own classes."""
    if not adapter.images:
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True)
        ids = tokenizer(
            prompt if adapter.text is None else adapter.text,
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        encoder = CLIPTextModel.from_pretrained(base / "text_encoder", local_files_only=True).eval()
        return encoder(ids).last_hidden_state
    tower = CLIPVisionModelWithProjection.from_pretrained(base / "image_encoder", local_files_only=True).eval()
    side = tower.config.image_size
    picture = Image.open(io.BytesIO(PICTURES[adapter.images[0]]))
    pixels = CLIPImageProcessorPil(size=side, crop_size=side)(picture, return_tensors="pt").pixel_values
    return tower(pixels, output_hidden_states=True).hidden_states[-2]


def as_peft(factors: dict[str, tuple[Tensor, Tensor, float]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A LoRA in diffusers' layout; alpha / rank stands in B, without metadata."""
    layers = {}
    for target, (down, up, alpha) in factors.items():
        name = target.replace("text_encoder.text_model.", "text_encoder.")
        name = name if name.startswith("unet.") or not _nested() else target
        extra = (1,) * (len(shapes[target]) - 2)
        layers[f"{name}.lora_A.weight"] = down.reshape(*down.shape, *extra).contiguous()
        layers[f"{name}.lora_B.weight"] = (up * alpha / len(down)).reshape(*up.shape, *extra).contiguous()
    return layers


def _nested() -> bool:
    return hasattr(CLIPTextModel, "text_model")


def by_peft(world: World, asked: Request, drawn_with: Path | None = None) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(
        drawn_with or world.base, image_encoder=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    names = [f"a{index}" for index in range(len(asked.adapters))]
    shapes = targets_of(world.base)
    with torch.no_grad():
        for name, adapter in zip(names, asked.adapters, strict=True):
            source: Any = world.lora
            if adapter.ref in world.predictors:
                states = states_of(world.base, adapter, asked.prompt)
                source = as_peft(world.predictors[adapter.ref].predict(states), shapes)
            pipeline.load_lora_weights(source, adapter_name=name)
    if names:
        weights = [
            {"unet": each.weight, "text_encoder": each.weight if each.text_weight is None else each.text_weight}
            for each in asked.adapters
        ]
        pipeline.set_adapters(names, weights)

    def before(step: int) -> None:
        for name, adapter in zip(names, asked.adapters, strict=True):
            for module in pipeline.unet.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_scale(name, adapter.weight if adapter.is_active(step, asked.steps or 0) else 0.0)

    def after(_pipeline: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        before(step + 1)
        return state

    before(0)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            asked.prompt,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            width=asked.width,
            height=asked.height,
            num_images_per_prompt=asked.num_images,
            generator=[torch.Generator("cpu").manual_seed((asked.seed or 0) + i) for i in range(asked.num_images)],
            callback_on_step_end=after,
            output_type="latent",
        ).images
    return latents


@pytest.mark.parametrize("name", CASES)
def test_alone_equals_diffusers_with_the_predicted_lora(world: World, name: str) -> None:
    asked = CASES[name]
    reference = by_peft(world, asked)
    assert (world.running.run([asked])[0].latents - reference).abs().max() <= TOLERANCE
    for adapter in asked.adapters:
        others = tuple(each for each in asked.adapters if each is not adapter)
        bare = by_peft(world, asked.model_copy(update={"adapters": others}))
        assert (reference - bare).abs().max() >= VISIBLE, f"the oracle does not show {adapter}"


def test_on_a_checkpoint_the_condition_is_read_by_the_base(world: World) -> None:
    own = request({"ref": "p/text", "text": "ink"}, {**RED, "weight": 0.5})
    asked = own.model_copy(update={"adapters": (Adapter(ref="my/dog"), *own.adapters)})
    reference = by_peft(world, own, drawn_with=world.checkpoint)
    assert (world.running.run([asked])[0].latents - reference).abs().max() <= TOLERANCE
    assert (by_peft(world, own) - reference).abs().max() >= VISIBLE


def test_another_condition_is_another_lora(world: World) -> None:
    red, blue, prompt, text = world.running.run(
        [CASES[name] for name in ("picture", "another picture", "the prompt", "a text of its own")]
    )
    assert (red.latents - blue.latents).abs().max() >= VISIBLE
    assert (prompt.latents - text.latents).abs().max() >= VISIBLE


def test_strangers_in_one_batch_are_as_alone(world: World) -> None:
    mixed = [
        request(RED),
        request(BLUE, seed=8),
        request(),
        CASES["beside a lora"],
        request({"ref": "p/text"}, steps=9),
    ]
    before = world.running.service.stats()
    together = world.running.run(mixed)
    after = world.running.service.stats()
    for asked, batched in zip(mixed, together, strict=True):
        assert (batched.latents - world.running.run([asked])[0].latents).abs().max() <= TOLERANCE
    assert after.mixed_steps - before.mixed_steps >= 8


@dataclass
class Counted:
    networks: int = 0
    pictures: int = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    predict, encode = Predictor.predict, ImageEncoder.encode

    def predicting(self: Predictor, condition: Tensor) -> Any:
        found.networks += 1
        return predict(self, condition)

    def encoding(self: ImageEncoder, pictures: Any) -> Any:
        found.pictures += 1
        return encode(self, pictures)

    monkeypatch.setattr(Predictor, "predict", predicting)
    monkeypatch.setattr(ImageEncoder, "encode", encoding)
    return found


def test_the_network_runs_once_for_one_condition(world: World, start: Callable[..., Any], counted: Counted) -> None:
    running = start(world.running.home, "tiny/base", {})
    try:
        running.run([request(RED)])
        assert counted == Counted(1, 1), "for three graphs"
        running.run([request(RED), request({**RED, "weight": 0.3, "start": 0.5}, prompt="a pear", seed=1)])
        assert counted == Counted(1, 1), "whatever else differs"
        running.run([request({**RED, "blocks": {"IN01": 0.5}})])
        assert counted == Counted(1, 1), "the record is kept apart from what is bound of it"
        running.run([request(BLUE)])
        assert counted == Counted(2, 2)
        running.run([request({"ref": "p/text"}), request({"ref": "p/text", "text": PLAIN["prompt"]}, prompt="a pear")])
        assert counted == Counted(3, 2), "the same words, wherever they stand"
        running.run([request({"ref": "p/text"}, prompt="a pear")])
        assert counted == Counted(4, 2)
    finally:
        running.service.close()


def test_the_receipt_says_what_was_read(world: World) -> None:
    adapters = world.running.run([CASES["beside a lora"]])[0].done.receipt.adapters
    by_ref = {each.ref: each for each in adapters}
    picture = f"sha256:{hashlib.sha256(PICTURES['red']).hexdigest()}"
    image, text = by_ref["p/image"], by_ref["p/text"]
    assert (image.kind, image.details["type"], image.details["condition"], image.details["rank"]) == (
        "hypernetwork",
        "predictor",
        "image",
        2,
    )
    assert image.details["pictures"] == [picture]
    assert (text.details["condition"], text.details["text"]) == ("text", None)


def test_weight_0_is_dropped_and_predicts_nothing(world: World, counted: Counted) -> None:
    dropped, plain = world.running.run([request({**BLUE, "weight": 0.0}, seed=99), request(seed=99)])
    assert (dropped.latents - plain.latents).abs().max() <= TOLERANCE
    assert dropped.done.receipt.dropped == (DroppedAdapter(ref="p/image", reason="weight 0"),)
    assert counted == Counted()


@pytest.mark.parametrize(
    ("adapter", "says", "field"),
    [
        ({"ref": "p/image"}, "from one picture, 0 were named", "adapters.images"),
        ({"ref": "p/image", "images": ["red", "blue"]}, "from one picture, 2 were named", "adapters.images"),
        ({**RED, "text": "ink"}, "reads a picture, not a text", "adapters.text"),
        ({"ref": "p/text", "image": "red"}, "reads a text, not pictures", "adapters.images"),
        ({"ref": "p/text", "text": "ink " * 76}, "more than 75 tokens; shorten it", "adapters.text"),
        ({**RED, "mask": "red"}, "means nothing", "adapters.masks"),
    ],
)
def test_a_wrong_condition_is_refused_at_the_edge(world: World, adapter: dict[str, Any], says: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        world.running.run([request(adapter)])
    assert caught.value.fields["field"] == field


def test_tensors_are_refused(world: World) -> None:
    asked = Request.parse(
        {**PLAIN, "adapters": [{"ref": "p/image", "image": "face"}], "tensors": {"face": np.ones(3, np.float32)}}
    )
    with pytest.raises(InvalidRequest, match="reads no tensors"):
        world.running.run([asked])


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("p/other-encoder", "was trained with another image encoder than that of tiny/base@1"),
        ("p/other-width", "reads pictures at width 56, but the image encoder of tiny/base@1 gives 48"),
    ],
)
def test_another_image_encoder_is_refused(world: World, ref: str, says: str) -> None:
    with pytest.raises(Incompatible, match=says):
        world.running.run([request({**RED, "ref": ref})])


def test_a_prediction_that_is_not_finite_fails_that_request_alone(world: World) -> None:
    with pytest.raises(Refused, match="NaN or infinite"):
        world.running.run([request({**RED, "ref": "p/loud"})])
    world.running.run([request(RED)])


def test_a_base_without_image_encoder_is_refused(
    world: World, tiny_base: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    file = save_predictor(world.predictors["p/image"], tmp_path / "a.safetensors")
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(tiny_base, "tiny/base")
        registry.publish(file, "p/image", base="tiny/base")
    running = start(tmp_path / "home", "tiny/base", {})
    try:
        with pytest.raises(Refused, match="through the base's image encoder, but tiny/base@1 has none"):
            running.run([request(RED)])
    finally:
        running.service.close()
