"""Adapters in the files that people have, for each family, draw what diffusers draws with the same weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from scumble.errors import InvalidRequest
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_registry.formats.source import Hints
from support.control_nets import load_unet, make_net, make_t2i_for, make_union, write_cldm, write_t2i
from support.formats_table import TOLERANCE, note
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_hypernetwork import WebuiAttention, WebuiHypernetwork, save_webui
from support.tiny_ip import FACE, make_image_encoder, make_ip_adapter
from support.tiny_lllite import apply_lllite, make_lllite, save_lllite

PROMPT = "a red thing asleep"
STEPS, GUIDANCE = 4, 5.0

pytestmark = [pytest.mark.oracle, pytest.mark.every_executor]


@dataclass
class World:
    family: str
    base: Path
    running: Any
    folder: Path
    encoder: Path
    plain: Tensor
    count: int = 0

    @property
    def is_xl(self) -> bool:
        return self.family == "sdxl"

    def pipeline(self, kind: Any = None, **more: Any) -> Any:
        kind = kind or (StableDiffusionXLPipeline if self.is_xl else StableDiffusionPipeline)
        return kind.from_pretrained(self.base, local_files_only=True, **more)

    def unet(self) -> Any:
        return load_unet(self.base)

    def file(self, name: str) -> Path:
        """Where a new file of this name can be written."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        return folder / name

    def publish(self, path: Path, **how: Any) -> str:
        name = f"x/{path.stem.lower().replace('_', '-')}-{self.count}"
        with Registry.open(self.folder / "home") as registry:
            version = registry.publish(path, name, base="the/base", **how)
        return version.ref

    def request(self, ref: str | None = None, **adapter: Any) -> Request:
        named = {"picture": PICTURE} if ref and "picture" in _names(adapter) else {}
        tensors = {name: values for name, values in FACES.items() if name in _names(adapter)}
        return Request.parse(
            {
                "prompt": PROMPT,
                "seed": 7,
                "steps": STEPS,
                "guidance_scale": GUIDANCE,
                "width": 64,
                "height": 64,
                "scheduler": "euler" if self.is_xl else "ddim",
                "adapters": [Adapter(ref=ref, **adapter)] if ref else [],
                "images": named,
                "tensors": tensors,
            }
        )

    def draw(self, ref: str | None = None, **adapter: Any) -> Tensor:
        latents: Tensor = self.running.run([self.request(ref, **adapter)])[0].latents
        return latents

    def hold(self, what: str, found: Tensor, expected: Tensor, oracle: str = "diffusers") -> None:
        far = (self.plain - expected).abs().max().item()
        note(what, self.family, oracle, (found - expected).abs().max().item(), far)


def _names(adapter: dict[str, Any]) -> tuple[str, ...]:
    return tuple(adapter.get("images", ()))


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


IMAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64))
PICTURE = _png(IMAGE)
FACES = {
    "face": np.random.default_rng(3).normal(size=FACE).astype(np.float32),
    "arcface": np.random.default_rng(4).normal(size=512).astype(np.float32),
}


def drawn(pipeline: Any, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            prompt=PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            width=64,
            height=64,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="latent",
            **more,
        ).images
    return latents


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def world(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    start: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp(request.param)
    makers: dict[str, Callable[[Path], Path]] = {"sd1": lambda _: tiny_base, "sd2": make_tiny_sd2}
    base = makers.get(request.param, make_tiny_sdxl)(folder / "base")
    encoder = make_image_encoder(folder / "encoder", preparation=True)
    with Registry.open(folder / "home", create=True) as registry:
        registry.publish(base, "the/base")
        registry.publish(encoder, "the/encoder")
    running = start(folder / "home", "the/base", {})
    made = World(request.param, base, running, folder, encoder, torch.empty(0))
    made.plain = made.draw()
    yield made
    running.service.close()


def embeddings(world: World) -> tuple[dict[str, Callable[[], Path]], list[Tensor]]:
    """Each layout with the same vectors, and these, one for each text encoder."""
    torch.manual_seed(3)
    first = torch.randn(3, {"sd1": 32, "sd2": 1024, "sdxl": 32}[world.family])
    second = torch.randn(3, 48)

    def saved(name: str, content: Any) -> Callable[[], Path]:
        def write() -> Path:
            file = world.file(name)
            save_file(content, file) if name.endswith(".safetensors") else torch.save(content, file)
            return file

        return write

    if world.is_xl:
        pair = {"clip_l": first, "clip_g": second}
        of_trainer = {"text_encoders_0": first, "text_encoders_1": second}
        return {
            "SDXL pair, .safetensors": saved("thing.safetensors", pair),
            "SDXL pair, .pt": saved("thing.pt", pair),
            "SDXL pair of diffusers' trainer": saved("thing.safetensors", of_trainer),
        }, [first, second]
    parameters = nn.ParameterDict({"*": nn.Parameter(first)})
    webui = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": first},
        "name": "other",
        "step": 100,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    return {
        "webui .pt": saved("thing.pt", webui),
        "original .pt": saved("thing.pt", {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}),
        "diffusers .bin": saved("learned_embeds.bin", {"thing": first}),
        "diffusers .safetensors": saved("learned_embeds.safetensors", {"thing": first}),
        "emb_params, .safetensors": saved("thing.safetensors", {"emb_params": first}),
        "emb_params, .pt": saved("thing.pt", {"emb_params": first}),
        "a tensor alone": saved("vectors.pt", first),
    }, [first]


def test_embeddings(world: World) -> None:
    layouts, vectors = embeddings(world)
    pipeline = world.pipeline()
    for place, values in enumerate(vectors):
        suffix = "" if place == 0 else f"_{place + 1}"
        encoder, tokenizer = (getattr(pipeline, f"{part}{suffix}") for part in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(values, token="thing", text_encoder=encoder, tokenizer=tokenizer)
    expected = drawn(pipeline)
    for name, write in layouts.items():
        named = {"trigger_words": ["thing"]} if name == "a tensor alone" else {}
        world.hold(f"textual inversion, {name}", world.draw(world.publish(write(), **named)), expected)


HYPERNETWORKS: dict[str, dict[str, Any]] = {
    "defaults": {"activation": "linear"},
    "norm, wide structure": {"activation": "swish", "norm": True, "structure": (1, 1.5, 2, 1)},
    "dropout, last layer not activated": {"activation": "tanh", "dropout": (0, 0.3, 0), "activate_output": False},
    "names of old": {"activation": "linear", "old": True},
}


@pytest.mark.parametrize("how", HYPERNETWORKS)
def test_hypernetworks_of_the_webui(world: World, how: str) -> None:
    if world.family != "sd1" and not how.startswith("norm"):
        pytest.skip("the options are the same for all families")
    options = dict(HYPERNETWORKS[how])
    old = options.pop("old", False)
    unet = world.unet()
    widths = sorted({layer.in_features for name, layer in unet.named_modules() if name.endswith(".to_k")})
    theirs = WebuiHypernetwork(widths, seed=1, **options)
    file = save_webui(theirs, world.file("ink.pt"), old=old)
    pipeline = world.pipeline()
    attention = WebuiAttention()
    attention.acting = [(theirs, 0.5)]
    pipeline.unet.set_attn_processor(attention)
    found = world.draw(world.publish(file), weight=0.5)
    world.hold(f"hypernetwork, webui .pt ({how})", found, drawn(pipeline), "the webui's formula in diffusers")


IP_ADAPTERS: dict[str, dict[str, Any]] = {
    "base": {"kind": "base"},
    "full-face": {"kind": "full"},
    "plus": {"kind": "plus", "tokens": 6},
    "FaceID": {"kind": "faceid", "lora": 4},
    "FaceID-Portrait": {"kind": "faceid", "tokens": 16},
    "FaceID-Plus": {"kind": "faceid_plus", "lora": 4},
    "FaceID-PlusV2": {"kind": "faceid_plus", "lora": 4},
    "InstantID": {"kind": "instantid", "tokens": 6},
}


@pytest.mark.parametrize("what", IP_ADAPTERS)
def test_ip_adapters(world: World, what: str) -> None:
    kind = IP_ADAPTERS[what]["kind"]
    if world.family == "sd2" and kind not in {"base", "plus"}:
        pytest.skip("nobody has published such a one for SD 2.x")
    flat = make_ip_adapter(world.base, world.file("ip.safetensors"), seed=1, gain=3.0, **IP_ADAPTERS[what])
    expected = with_ip_adapter(world, flat, kind, shortcut=what == "FaceID-PlusV2")
    tensors = load_file(flat)
    training = {name.replace("image_proj.", "image_proj_model.", 1): v for name, v in tensors.items()}
    training = {name.replace("ip_adapter.", "adapter_modules.", 1): v for name, v in training.items()}
    written = {".safetensors": flat, ".bin": world.file("ip-adapter.bin")}
    torch.save(halves(tensors), written[".bin"])
    if kind == "base":
        written["training checkpoint"] = world.file("checkpoint.bin")
        torch.save(training, written["training checkpoint"])
    images = {"base": ("picture",), "full": ("picture",), "plus": ("picture",), "faceid": ("face",)}
    looks = images.get(kind, ("arcface",) if kind == "instantid" else ("picture", "face"))
    named = {"image_encoder": "the/encoder"} if "picture" in looks else {}
    hints = {"hints": Hints(shortcut=what == "FaceID-PlusV2")} if kind == "faceid_plus" else {}
    for layout, file in written.items():
        found = world.draw(world.publish(file, **named, **hints), images=looks)
        world.hold(f"IP-Adapter {what}, {layout}", found, expected)


def halves(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, values in tensors.items():
        half, _, rest = name.partition(".")
        found[half][rest] = values
    return found


def with_ip_adapter(world: World, flat: Path, kind: str, *, shortcut: bool) -> Tensor:
    pipeline = world.pipeline()
    pipeline.register_modules(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(world.encoder).eval(),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(world.encoder),
    )
    pipeline.load_ip_adapter(str(flat.parent), subfolder="", weight_name=flat.name, image_encoder_folder=None)
    if kind in {"base", "full", "plus"}:
        return drawn(pipeline, ip_adapter_image=IMAGE)
    face = torch.from_numpy(FACES["arcface" if kind == "instantid" else "face"])[None, None]
    if kind == "instantid":
        face = face[:, :, None]  # one state of one picture
    if kind == "faceid_plus":
        layer = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds = pipeline.prepare_ip_adapter_image_embeds([IMAGE], None, "cpu", 1, True)[0]
        layer.shortcut = shortcut
    return drawn(pipeline, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(face), face])])


def test_controlnets(world: World) -> None:
    unet = world.unet()
    net = make_net(unet, 1)
    kind = StableDiffusionXLControlNetPipeline if world.is_xl else StableDiffusionControlNetPipeline
    expected = drawn(world.pipeline(kind, controlnet=net), image=IMAGE, controlnet_conditioning_scale=0.8)
    flat = write_cldm(net, world.file("original.safetensors"))
    pickled = world.file("original.pth")
    torch.save({name.removeprefix("control_model."): v for name, v in load_file(flat).items()}, pickled)
    lightning = world.file("training.ckpt")
    rest = {"model.diffusion_model.out.2.weight": torch.ones(4, 4)}
    torch.save({"state_dict": load_file(flat) | rest, "optimizer_states": []}, lightning)
    net.save_pretrained(world.folder / "bare")
    files = {
        "original .safetensors": flat,
        "original .pth": pickled,
        "original, in the model it was trained on": lightning,
        "differences to the base": write_cldm(net, world.file("difference.safetensors"), unet),
        "diffusers, without config.json": world.folder / "bare" / "diffusion_pytorch_model.safetensors",
    }
    for name, file in files.items():
        found = world.draw(world.publish(file), images=("picture",), weight=0.8)
        world.hold(f"ControlNet, {name}", found, expected)


def test_t2i_adapters_in_the_original_layout(world: World) -> None:
    adapter = make_t2i_for(world.unet(), 2)
    kind = StableDiffusionXLAdapterPipeline if world.is_xl else StableDiffusionAdapterPipeline
    expected = drawn(world.pipeline(kind, adapter=adapter), image=IMAGE)
    found = world.draw(world.publish(write_t2i(adapter, world.file("t2iadapter.pth"))), images=("picture",))
    world.hold(f"T2I-Adapter, original{' (XL)' if world.is_xl else ''}", found, expected)


def test_lllites(world: World) -> None:
    if not world.is_xl:
        pytest.skip("LLLites are SDXL's")
    pipeline = world.pipeline()
    lites = make_lllite(pipeline.unet, 5)
    ref = world.publish(save_lllite(lites, pipeline.unet, world.file("lllite.safetensors")))
    picture = torch.from_numpy(np.asarray(IMAGE).astype(np.float32) / 255).permute(2, 0, 1)[None]
    apply_lllite(lites, pipeline.unet, picture, 0.7)
    found = world.draw(ref, images=("picture",), weight=0.7)
    world.hold("ControlNet-LLLite, kohya", found, drawn(pipeline), "sd-scripts' formula in diffusers")
    with pytest.raises(InvalidRequest, match="LLLite"):
        world.draw(ref, images=("picture",), mode="guess")
    several = [
        world.request(ref, images=("picture",), weight=0.7),
        world.request(),
        world.request(ref, images=("picture",), weight=0.7, end=0.5),
        world.request(ref, images=("picture",), weight=0.7, mode="control"),
    ]
    together = [each.latents for each in world.running.run(several)]
    alone = [found, world.plain, *(world.running.run([each])[0].latents for each in several[2:])]
    assert max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True)) <= TOLERANCE
    assert all((found - other).abs().max() > 10 * TOLERANCE for other in alone[1:])


def test_union_nets_without_a_config(world: World) -> None:
    if not world.is_xl:
        pytest.skip("union nets are SDXL's")
    folder = world.folder / "union"
    make_union_of_eight_heads(world).save_pretrained(folder)
    net = ControlNetUnionModel.from_pretrained(folder)
    pipeline = world.pipeline(StableDiffusionXLControlNetUnionPipeline, controlnet=net)
    expected = drawn(pipeline, control_image=[IMAGE], control_mode=[3], controlnet_conditioning_scale=0.02)
    ref = world.publish(folder / "diffusion_pytorch_model.safetensors")
    found = world.draw(ref, images=("picture",), control_type=("canny",), weight=0.02)
    world.hold("ControlNet union, without config.json", found, expected)


def make_union_of_eight_heads(world: World) -> ControlNetUnionModel:
    return make_union(world.unet(), 4, heads=8)
