"""Whole requests with ControlNets and T2I-Adapters, against diffusers' own pipelines."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from scumble.errors import InvalidRequest
from scumble.request import Adapter, Options, Request
from scumble_build.control_maps import control_map, parse
from scumble_build.graphs.control_models import load_net
from scumble_registry import Registry
from scumble_server.executors.torch.net import TorchNet
from scumble_server.methods.controlnet import nets as made_here
from scumble_server.methods.controlnet.checks import CONTROL_TYPES
from support.control_nets import UNION_TYPES, load_unet, make_net, make_t2i, make_union, write_control_lora

if TYPE_CHECKING:
    from support.running import Running

TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {"a": picture(1), "b": picture(2), "wide": picture(3, 96, 40)}


def request(*adapters: Adapter, **changes: Any) -> Request:
    names = {name for adapter in adapters for name in adapter.images}
    images = {name: encoded(PICTURES[name]) for name in names}
    return Request.parse({**PLAIN, "adapters": adapters, "images": images, **changes})


def net(ref: str, image: str | tuple[str, ...] = "a", **fields: Any) -> Adapter:
    return Adapter(ref=ref, images=image, **fields)


@pytest.fixture(scope="module")
def nets(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By reference: two nets, one that averages its residuals, a union net, two T2I-Adapters, a control-LoRA."""
    folder = tmp_path_factory.mktemp("nets")
    unet = load_unet(tiny_base)
    made = {
        "c/one": make_net(unet, 1),
        "c/two": make_net(unet, 2),
        "c/pooled": make_net(unet, 3, global_pool_conditions=True),
        "c/union": make_union(unet, 4),
        "c/t2i": make_t2i((16, 32), 5),
        "c/grey": make_t2i((16, 32), 6, in_channels=1),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    write_control_lora(made["c/one"], folder / "lora.safetensors")
    return {name: folder / name for name in made} | {"c/lora": folder / "lora.safetensors"}


@pytest.fixture(scope="module")
def running(
    tiny_base: Path,
    nets: dict[str, Path],
    make_lora: Callable[..., Path],
    start: Callable[..., Running],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    files = {"base": tiny_base, "l/a": make_lora(tiny_base, tmp_path_factory.mktemp("lora"), seed=1), **nets}
    with Registry.open(home, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        for name, path in files.items():
            if name != "base":
                registry.publish(path, name=name, base="tiny/base")
    started = start(home, "tiny/base", files)
    yield started
    started.service.close()


def drawn(pipeline: Any, asked: Request, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            width=asked.width,
            height=asked.height,
            num_images_per_prompt=asked.num_images,
            generator=[torch.Generator("cpu").manual_seed((asked.seed or 0) + i) for i in range(asked.num_images)],
            output_type="latent",
            **more,
        ).images
    return latents


def with_nets(running: Running, asked: Request, **more: Any) -> Tensor:
    """diffusers' ControlNet pipeline over the same nets, in the request's order."""
    chosen = [each for each in asked.adapters if each.ref.startswith("c/")]
    models = [ControlNetModel.from_pretrained(running.files[each.ref], local_files_only=True) for each in chosen]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        running.files["base"], controlnet=models if len(models) > 1 else models[0], local_files_only=True
    )
    for each in asked.adapters:
        if each.ref.startswith("l/"):
            pipeline.load_lora_weights(running.files[each.ref], adapter_name="l")
            pipeline.set_adapters(["l"], [each.weight])

    def of_each(values: Sequence[Any]) -> Any:
        return list(values) if len(chosen) > 1 else values[0]

    return drawn(
        pipeline,
        asked,
        image=of_each([PICTURES[each.images[0]] for each in chosen]),
        controlnet_conditioning_scale=of_each([each.weight for each in chosen]),
        control_guidance_start=of_each([each.start for each in chosen]),
        control_guidance_end=of_each([each.end for each in chosen]),
        guess_mode=any(each.mode == "guess" for each in chosen),
        **more,
    )


def with_features(running: Running, asked: Request) -> Tensor:
    models = [T2IAdapter.from_pretrained(running.files[each.ref], local_files_only=True) for each in asked.adapters]
    pipeline = StableDiffusionAdapterPipeline.from_pretrained(
        running.files["base"],
        adapter=MultiAdapter(models) if len(models) > 1 else models[0],
        local_files_only=True,
    )
    pictures = [
        PICTURES[each.images[0]].convert("L" if model.config.in_channels == 1 else "RGB")
        for each, model in zip(asked.adapters, models, strict=True)
    ]
    several = len(models) > 1
    _end_features(pipeline, max(each.end for each in asked.adapters), asked.steps or 0)
    return drawn(
        pipeline,
        asked,
        image=pictures if several else pictures[0],
        adapter_conditioning_scale=[each.weight for each in asked.adapters] if several else asked.adapters[0].weight,
    )


def _end_features(pipeline: StableDiffusionAdapterPipeline, end: float, steps: int) -> None:
    """As diffusers' SDXL pipeline's `adapter_conditioning_factor` does, which this one lacks."""
    forward, step = pipeline.unet.forward, itertools.count()

    def without_late_features(*args: Any, **more: Any) -> Any:
        if next(step) >= int(steps * end):
            more["down_intrablock_additional_residuals"] = None
        return forward(*args, **more)

    pipeline.unet.forward = without_late_features


NETS = {
    "one net": request(net("c/one")),
    "negative weight": request(net("c/one", weight=-0.6)),
    "two nets": request(net("c/one", weight=0.5), net("c/two", "b", weight=0.8)),
    "one net twice": request(net("c/one", weight=0.5), net("c/one", "b", weight=0.4)),
    "start and end": request(net("c/one", start=0.2, end=0.7), steps=10),
    "two schedules": request(net("c/one", end=0.5), net("c/two", "b", start=0.35, weight=0.7), steps=10),
    "guess": request(net("c/one", mode="guess"), negative_prompt="blurry"),
    "two guesses": request(net("c/one", mode="guess", weight=0.7), net("c/two", mode="guess")),
    "guess without guidance": request(net("c/one", mode="guess"), guidance_scale=1.0),
    "no guidance": request(net("c/one"), guidance_scale=1.0),
    "averaged": request(net("c/pooled", weight=0.8)),
    "resized picture": request(net("c/one", "wide")),
    "not square": request(net("c/one", "wide"), width=96, height=40),
    "latents that halve to odd sizes": request(net("c/one"), width=72, height=56),
    "several images": request(net("c/one"), num_images=2, scheduler="ddim"),
    "beside a lora": request(net("c/one"), Adapter(ref="l/a", weight=0.3)),
}
FEATURES = {
    "one": request(net("c/t2i")),
    "grey": request(net("c/grey", weight=0.7)),
    "two": request(net("c/t2i", weight=0.5), net("c/t2i", "b", weight=0.6)),
    "end": request(net("c/t2i", end=0.5), steps=10),
    "resized picture": request(net("c/t2i", "wide")),
    "latents that halve to odd sizes": request(net("c/t2i"), width=72, height=56),
}


@pytest.mark.every_executor
@pytest.mark.parametrize("name", NETS)
def test_nets_equal_diffusers(running: Running, name: str) -> None:
    asked = NETS[name]
    expected = with_nets(running, asked)
    bare = asked.model_copy(update={"adapters": asked.adapters[1:] if name == "beside a lora" else (), "images": {}})
    assert (running.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
    assert (running.run([bare])[0].latents - expected).abs().max() >= VISIBLE, "the oracle shows nothing"


@pytest.mark.every_executor
@pytest.mark.parametrize("name", FEATURES)
def test_t2i_adapters_equal_diffusers(running: Running, name: str) -> None:
    asked = FEATURES[name]
    expected = with_features(running, asked)
    bare = asked.model_copy(update={"adapters": (), "images": {}})
    assert (running.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
    assert (running.run([bare])[0].latents - expected).abs().max() >= VISIBLE, "the oracle shows nothing"


def with_union(running: Running, asked: Request) -> Tensor:
    """No pipeline of SD 1.x takes a union net: its call, in the loop of diffusers' ControlNet pipeline."""
    (adapter,) = asked.adapters
    model = ControlNetUnionModel.from_pretrained(running.files[adapter.ref], local_files_only=True)
    pipeline = StableDiffusionPipeline.from_pretrained(running.files["base"], local_files_only=True)
    types = [CONTROL_TYPES[name] for name in adapter.control_type]
    controls = [
        torch.from_numpy(np.asarray(PICTURES[name]).astype(np.float32) / 255).permute(2, 0, 1)[None]
        for name in adapter.images
    ]
    present = torch.zeros(1, UNION_TYPES)
    present[:, types] = 1
    scales = [adapter.weight * scale for scale in adapter.scale or [1.0] * len(types)]
    forward, step = pipeline.unet.forward, itertools.count()

    def controlled(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:
        if adapter.is_active(next(step), asked.steps or 0):
            guess = adapter.mode == "guess"
            half = slice(1, 2) if guess else slice(0, 2)
            rows = 1 if guess else 2
            down, middle = model(
                sample[half],
                timestep,
                encoder_hidden_states[half],
                [control.expand(rows, -1, -1, -1) for control in controls],
                present.expand(rows, -1),
                types,
                scales,
                guess_mode=guess,
                return_dict=False,
            )
            if guess:
                down = [torch.cat([torch.zeros_like(each), each]) for each in down]
                middle = torch.cat([torch.zeros_like(middle), middle])
            more |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return forward(sample, timestep, encoder_hidden_states, **more)

    pipeline.unet.forward = controlled
    return drawn(pipeline, asked)


UNIONS = {
    "one kind": request(net("c/union", weight=0.02, control_type="canny")),
    "another kind": request(net("c/union", weight=0.02, control_type="depth")),
    "two kinds": request(net("c/union", ("a", "b"), weight=0.5, control_type=("openpose", "seg"))),
    "two kinds, each at its own weight": request(
        net("c/union", ("a", "b"), weight=0.5, scale=[1, -0.4], control_type=("openpose", "depth"))
    ),
    "guess": request(net("c/union", weight=0.02, control_type="canny", mode="guess")),
    "start and end": request(net("c/union", ("a", "b"), start=0.2, end=0.7, control_type=("normal", "hed")), steps=10),
}


@pytest.mark.every_executor
@pytest.mark.parametrize("name", UNIONS)
def test_union_nets_equal_diffusers(running: Running, name: str) -> None:
    asked = UNIONS[name]
    expected = with_union(running, asked)
    bare = asked.model_copy(update={"adapters": (), "images": {}})
    assert (running.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
    assert (running.run([bare])[0].latents - expected).abs().max() >= VISIBLE, "the oracle shows nothing"


@pytest.mark.every_executor
def test_a_control_lora_equals_the_merged_net(running: Running, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "diffusion_pytorch_model.safetensors").symlink_to(running.files["c/lora"])
    load_net(tmp_path / "lora", lambda: running.files["base"] / "unet").save_pretrained(tmp_path / "c" / "merged")
    before = running.executor.weights_digest()
    asked = request(net("c/lora", weight=0.8))
    found = running.run([asked])[0].latents
    merged = asked.model_copy(update={"adapters": (net("c/merged", weight=0.8),)})
    running.files["c/merged"] = tmp_path / "c" / "merged"
    expected = with_nets(running, merged)
    assert (found - expected).abs().max() <= TOLERANCE
    assert (running.run([request(net("c/one", weight=0.8))])[0].latents - expected).abs().max() >= VISIBLE
    assert running.executor.weights_digest() == before, "the base is only read"


@pytest.mark.every_executor
@pytest.mark.parametrize("mode", ["prompt", "control"])
@pytest.mark.parametrize("ref", ["c/one", "c/t2i"])
def test_control_modes_are_the_formulas(running: Running, ref: str, mode: str) -> None:
    """Residual i of n times 0.825^(n-1-i); features times the last of 0.25, 0.62, 0.825, 1; `control` leaves the
    negative half alone."""
    asked = request(net(ref, weight=0.8, mode=mode), negative_prompt="blurry")
    if ref == "c/one":
        model: Any = ControlNetModel.from_pretrained(running.files[ref], local_files_only=True)
        kind, more = StableDiffusionControlNetPipeline, {"controlnet_conditioning_scale": 0.8}
        pipeline = kind.from_pretrained(running.files["base"], controlnet=model, local_files_only=True)
        factors = [0.825**4, 0.825**3, 0.825**2, 0.825, 1]
    else:
        model = T2IAdapter.from_pretrained(running.files[ref], local_files_only=True)
        pipeline = StableDiffusionAdapterPipeline.from_pretrained(
            running.files["base"], adapter=model, local_files_only=True
        )
        more = {"adapter_conditioning_scale": 0.8}
        factors = [0.825, 1]
    forward = pipeline.unet.forward

    def scaled(values: Sequence[Tensor]) -> list[Tensor]:
        halves = torch.tensor([0.0 if mode == "control" else 1.0, 1.0]).view(-1, 1, 1, 1)
        return [value * factor * halves for value, factor in zip(values, factors, strict=True)]

    def with_factors(*args: Any, **given: Any) -> Any:
        if ref == "c/one":
            down, middle = given["down_block_additional_residuals"], given["mid_block_additional_residual"]
            *down, middle = scaled([*down, middle])
            given |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        else:
            name = "down_intrablock_additional_residuals"
            given[name] = scaled(given[name])
        return forward(*args, **given)

    pipeline.unet.forward = with_factors
    expected = drawn(pipeline, asked, image=PICTURES["a"], **more)
    assert (running.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
    balanced = asked.model_copy(update={"adapters": (net(ref, weight=0.8),)})
    assert (running.run([balanced])[0].latents - expected).abs().max() >= VISIBLE, "the mode shows nothing"


def test_strangers_with_and_without_nets_equal_each_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a net runs once per step for all rows that ask, in which those of a guess count once."""
    runs: list[tuple[int, int]] = []
    residuals = TorchNet.residuals

    def counted(self: TorchNet, sample: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        runs.append((id(self), len(sample)))
        return residuals(self, sample, *more)

    monkeypatch.setattr(TorchNet, "residuals", counted)
    together = [
        request(seed=1),
        request(net("c/one"), seed=2),
        request(net("c/one", "b", mode="guess"), seed=3),
        request(net("c/two", weight=0.7), net("c/one", weight=0.4), seed=4),
        request(net("c/t2i"), seed=5),
        request(net("c/union", ("a", "b"), weight=0.5, control_type=("openpose", "seg")), seed=6),
        request(net("c/union", ("b", "a"), weight=0.4, control_type=("openpose", "seg")), seed=7),
        request(net("c/union", weight=0.02, control_type="canny"), Adapter(ref="l/a", weight=0.3), seed=8),
        request(net("c/pooled", end=0.6), net("c/grey", start=0.3), seed=9, guidance_scale=1.0),
    ]
    alone = [running.run([each])[0].latents for each in together]
    runs.clear()
    before = running.service.stats().steps
    found = running.run(together)
    steps = running.service.stats().steps - before
    for mine, expected in zip(found, alone, strict=True):
        assert (mine.latents - expected).abs().max() <= TOLERANCE
    assert steps < 3 * 8, "they shared steps"
    assert len({net for net, _ in runs}) == 3
    assert max(rows for _, rows in runs) >= 4, "rows of different requests shared a run"
    assert len(runs) <= 3 * steps, "no net runs twice in a step"


def test_maps_are_returned_if_asked_for(running: Running) -> None:
    canny = {"name": "canny", "low": 30, "high": 90}
    asked = request(
        net("c/one", "wide", preprocess=canny),
        net("c/two", "b"),
        net("c/union", ("a", "b"), preprocess="invert", weight=0.1, control_type=("canny", "depth")),
        options={"return_maps": True},
    )
    done = running.run([asked])[0].done
    wide, a, b = (np.asarray(PICTURES[name]) for name in ("wide", "a", "b"))
    expected = [control_map(wide, 64, 64, parse(canny)), 255 - a, 255 - b]
    assert done.maps is not None
    assert (done.maps == np.stack(expected)).all()
    assert done.receipt.adapters[0].details["preprocess"] == canny
    assert done.receipt.adapters[0].details["images"] == ["wide"]
    assert running.run([asked.model_copy(update={"options": Options()})])[0].done.maps is None


def test_a_map_made_here_is_the_map_brought_along(running: Running) -> None:
    made = request(net("c/one", preprocess="scribble"))
    ready = Image.fromarray(control_map(np.asarray(PICTURES["a"]), 64, 64, parse("scribble")))
    brought = made.model_copy(update={"adapters": (net("c/one"),), "images": {"a": encoded(ready)}})
    first, second = running.run([made])[0], running.run([brought])[0]
    assert (first.latents - second.latents).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("adapter", "field", "says"),
    [
        (Adapter(ref="c/one"), "images", "needs a picture"),
        (net("c/one", ("a", "b")), "images", "looks at one picture, not 2"),
        (net("c/one", control_type="canny"), "control_type", "one kind of control only"),
        (net("c/one", scale=[1.0]), "scale", "only as a list of numbers for the pictures of a union net"),
        (net("c/one", preprocess="depth"), "preprocess", "there is no preprocessor 'depth'"),
        (net("c/one", preprocess={"name": "canny", "low": -5}), "preprocess", "low: "),
        (net("c/one", text_weight=0.5), "text_weight", "text_weight means nothing"),
        (net("c/one", blocks=(1.0,) * 17), "blocks", "blocks means nothing"),
        (net("c/t2i", mode="guess"), "mode", "no guess mode"),
        (net("c/union"), "control_type", r"what each of its 1 pictures shows \(0 given\); it knows openpose"),
        (net("c/union", control_type=("canny", "depth")), "control_type", "its 1 pictures"),
        (net("c/union", control_type="faces"), "control_type", "does not know 'faces'; it knows openpose, depth"),
        (net("c/union", control_type="tile"), "control_type", "does not know 'tile'"),
        (net("c/union", ("a", "b"), control_type=("canny", "seg"), scale=[1.0]), "scale", "has 2 pictures"),
        (net("c/union", control_type="canny", scale={"down": 1.0}), "scale", "only as a list"),
    ],
)
def test_what_a_net_cannot_do_is_said_at_the_edge(running: Running, adapter: Adapter, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        running.run([request(adapter)])
    assert caught.value.fields["field"] == f"adapters.{field}"


def test_a_tensor_is_no_picture(running: Running) -> None:
    asked = Request.parse({**PLAIN, "adapters": [net("c/one", "t")], "tensors": {"t": np.ones(3, np.float32)}})
    with pytest.raises(InvalidRequest, match="takes pictures, not tensors"):
        running.run([asked])


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (net("c/one", weight=0.0), "weight 0"),
        (net("c/one", start=0.0, end=0.05), "no step of 8 lies between start 0 and end 0.05"),
        (net("c/union", control_type="canny", scale=[0.0]), "scale 0"),
    ],
)
def test_a_net_that_would_do_nothing_is_dropped(running: Running, adapter: Adapter, reason: str) -> None:
    found = running.run([request(adapter)])[0]
    assert reason in found.done.receipt.dropped[0].reason
    assert (found.latents - running.run([request()])[0].latents).abs().max() <= TOLERANCE


def test_nets_and_embedded_pictures_are_made_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def count(name: str) -> None:
        made = getattr(made_here, name)
        monkeypatch.setattr(made_here, name, lambda *given: calls.append(name) or made(*given))

    for name in ("load_net", "load_union", "load_t2i", "control_map"):
        count(name)
    asked = request(net("c/two", "b", preprocess="canny"), net("c/t2i"), net("c/union", "b", control_type="seg"))
    running.run([asked])
    calls.clear()
    running.run([asked, asked.model_copy(update={"seed": 8, "prompt": "a pear"})])
    assert calls == []
    running.run([request(net("c/two", "b", preprocess="invert"))])
    assert calls == ["control_map"]


def test_nets_compute_in_the_executors_precision(running: Running, start: Callable[..., Running]) -> None:
    half = start(running.home, "tiny/base", running.files, precision="bf16")
    try:
        asked = request(net("c/one"), net("c/t2i"), net("c/union", weight=0.02, control_type="canny"))
        found = half.run([asked])[0].latents
        assert found.isfinite().all()
        assert (found - running.run([asked])[0].latents).abs().mean() <= 0.3
    finally:
        half.service.close()


def test_a_light_t2i_adapter_equals_diffusers(tiny_base: Path, start: Callable[..., Running], tmp_path: Path) -> None:
    """Its last two features are equally wide, so its base has a level more."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = load_unet(tiny_base).config
    blocks = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**config, **blocks}).save_pretrained(base / "unet")
    make_t2i((16, 32), 1, "light_adapter").save_pretrained(tmp_path / "light")
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(base, name="tiny/three")
        registry.publish(tmp_path / "light", name="c/light", base="tiny/three")
    running = start(tmp_path / "home", "tiny/three", {"base": base, "c/light": tmp_path / "light"})
    try:
        asked = request(net("c/light", weight=3.0))
        expected = with_features(running, asked)
        assert (running.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
        assert (running.run([request()])[0].latents - expected).abs().max() >= VISIBLE
    finally:
        running.service.close()
