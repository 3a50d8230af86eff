"""The same factors in every spelling that is in use; diffusers loads what it knows, and draws."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from scumble.errors import Incompatible
from scumble.request import Adapter
from scumble_registry.compatibility.original_names import original_names
from support.formats_table import note
from support.lora_bench import PLAIN

if TYPE_CHECKING:
    from support.lora_bench import Bench

pytestmark = pytest.mark.oracle
RANK, SCALE = 3, 1.5
ATTENTION = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_out.0")
MORE = ("proj_in", "ff.net.2", "conv1", "downsamplers.0.conv", "time_emb_proj")
TEXT = ("self_attn.q_proj", "self_attn.out_proj")
Factors = dict[str, tuple[Tensor, Tensor]]


def factors(pipeline: Any, ends: tuple[str, ...], *, text: bool = True) -> Factors:
    """`component.module` → down and up, random, over every layer that ends so. Text encoders with `text_model.`."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for component, weight_name, weight in weights(pipeline):
        name = f"{component}.{weight_name}"
        if name.endswith(ends) if component == "unet" else text and name.endswith(TEXT):
            ones = (1,) * (weight.ndim - 2)
            down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.15
            found[name] = down, torch.randn(len(weight), RANK, *ones, generator=generator) * 0.15
    return found


def weights(pipeline: Any) -> Iterator[tuple[str, str, Tensor]]:
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if hasattr(pipeline, component):
            for name, module in getattr(pipeline, component).named_modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    bare = component != "unet" and not name.startswith(("text_model.", "text_projection"))
                    yield component, f"text_model.{name}" if bare else name, module.weight


def merge(pipeline: Any, made: Factors, scale: float = 1.0) -> Any:
    """W + scale · up · down."""
    for component, name, weight in weights(pipeline):
        if (pair := made.get(f"{component}.{name}")) is not None:
            down, up = pair
            weight.data += scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return pipeline


def save(file: Path, made: Factors, spell: Callable[[str], tuple[str, str]], alpha: float | None = None) -> Path:
    """`spell` gives a module's two keys; alphas stand beside them in kohya's way."""
    tensors = {}
    for name, pair in made.items():
        keys = spell(name)
        tensors |= {key: values.contiguous() for key, values in zip(keys, pair, strict=True)}
        if alpha is not None:
            tensors[f"{keys[0].partition('.')[0]}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def kohya(family: str, modules: list[str] | None = None) -> Callable[[str], tuple[str, str]]:
    """With a UNet's modules: by their original names."""
    original = original_names(modules or [])
    first = "lora_te1_" if family == "sdxl" else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}

    def spell(name: str) -> tuple[str, str]:
        component, _, module = name.partition(".")
        flat = prefixes[component] + original.get(module, module).replace(".", "_")
        return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"

    return spell


def dotted(down: str, up: str, *, prefix: bool = True) -> Callable[[str], tuple[str, str]]:
    return lambda name: tuple(  # type: ignore[return-value]
        f"{name if prefix else name.partition('.')[2]}.{end}" for end in (down, up)
    )


def processor(name: str, *, prefix: bool = True) -> tuple[str, str]:
    """diffusers' oldest: `to_q` → `processor.to_q_lora.down.weight`, `out_proj` → `to_out_lora` in text."""
    module, _, layer = name.replace(".to_out.0", ".to_out").replace(".out_proj", ".to_out").rpartition(".")
    layer = layer.replace("q_proj", "to_q")
    start = module if prefix else module.partition(".")[2]
    of_text = name.startswith("text")
    place = f"{start}.{layer}_lora" if of_text else f"{start}.processor.{layer}_lora"
    return f"{place}.down.weight", f"{place}.up.weight"


def original_dotted(modules: list[str]) -> Callable[[str], tuple[str, str]]:
    original = original_names(modules)
    towers = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

    def spell(name: str) -> tuple[str, str]:
        component, _, module = name.partition(".")
        place = f"text_encoders.{towers[component]}.transformer.{module}" if component in towers else ""
        place = place or f"diffusion_model.{original[module]}"
        return f"{place}.lora_down.weight", f"{place}.lora_up.weight"

    return spell


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_kohya(bench: Bench, tmp_path: Path, family: str) -> None:
    made = factors(bench.pipeline(family), (*ATTENTION, *MORE))
    file = save(tmp_path / "a.safetensors", made, kohya(family), alpha=SCALE * RANK)
    pipeline = bench.pipeline(family)
    pipeline.load_lora_weights(file)
    version = bench.compare(family, file, pipeline, name="kohya, diffusers' names", oracle="diffusers")
    assert version.manifest.compatibility.family == family


def test_kohya_sdxl_by_original_names(bench: Bench, tmp_path: Path) -> None:
    pipeline = bench.pipeline("sdxl")
    made = factors(pipeline, (*ATTENTION, *MORE))
    modules = [name for name, _ in pipeline.unet.named_modules()]
    file = save(tmp_path / "a.safetensors", made, kohya("sdxl", modules), alpha=SCALE * RANK)
    pipeline.load_lora_weights(file)
    bench.compare("sdxl", file, pipeline, name="kohya, original names", oracle="diffusers")


def test_lycoris_own_prefix_and_a_missing_alpha(bench: Bench, tmp_path: Path) -> None:
    made = factors(bench.pipeline("sd1"), (*ATTENTION, *MORE), text=False)
    spell = kohya("sd1")

    def own(name: str) -> tuple[str, str]:
        down, up = spell(name)
        return down.replace("lora_unet", "lycoris"), up.replace("lora_unet", "lycoris")

    file = save(tmp_path / "a.safetensors", made, own)
    bench.compare("sd1", file, merge(bench.pipeline("sd1"), made), name="LyCORIS, own prefix", oracle="merged weights")


@pytest.mark.parametrize(
    ("name", "spell", "ends"),
    [
        ("diffusers, processors", processor, ATTENTION),
        ("diffusers, lora.down", dotted("lora.down.weight", "lora.up.weight"), (*ATTENTION, *MORE)),
        (
            "diffusers, lora_linear_layer",
            dotted("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
            ATTENTION,
        ),
        ("diffusers/PEFT without metadata", dotted("lora_A.weight", "lora_B.weight"), (*ATTENTION, *MORE)),
        ("PEFT's names with an adapter's", dotted("lora_A.style.weight", "lora_B.style.weight"), ATTENTION),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_spellings(
    bench: Bench, tmp_path: Path, family: str, name: str, spell: Callable[[str], tuple[str, str]], ends: tuple[str, ...]
) -> None:
    made = factors(bench.pipeline(family), ends)
    file = save(tmp_path / "a.safetensors", made, spell)
    bench.compare(family, file, merge(bench.pipeline(family), made), name=name, oracle="merged weights")


@pytest.mark.parametrize(
    ("name", "spell"),
    [
        ("diffusers, processors, no prefix", lambda name: processor(name, prefix=False)),
        ("diffusers/PEFT, no prefix", dotted("lora_A.weight", "lora_B.weight", prefix=False)),
    ],
    ids=["processors", "peft"],
)
def test_without_a_prefix_it_is_the_unets(
    bench: Bench, tmp_path: Path, name: str, spell: Callable[[str], tuple[str, str]]
) -> None:
    made = factors(bench.pipeline("sd1"), ATTENTION, text=False)
    file = save(tmp_path / "a.safetensors", made, spell)
    bench.compare("sd1", file, merge(bench.pipeline("sd1"), made), name=name, oracle="merged weights")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_original_dotted_names(bench: Bench, tmp_path: Path, family: str) -> None:
    pipeline = bench.pipeline(family)
    made = factors(pipeline, (*ATTENTION, *MORE))
    spell = original_dotted([name for name, _ in pipeline.unet.named_modules()])
    file = save(tmp_path / "a.safetensors", made, spell)
    bench.compare(family, file, merge(pipeline, made), name="original names, dotted", oracle="merged weights")


def test_peft_with_numbers_in_the_header(bench: Bench, tmp_path: Path, make_lora: Callable[..., Path]) -> None:
    for family in ("sd1", "sdxl"):
        file = make_lora(bench.folders[family], tmp_path / family, seed=3, full=True)
        tensors, pipeline = load_file(file), bench.pipeline(family)
        assert len(tensors) > 50
        pipeline.load_lora_weights(file)
        pipeline.set_adapters(pipeline.get_active_adapters(), 0.4)
        bench.compare(family, file, pipeline, name="diffusers/PEFT", oracle="diffusers", weight=0.4)


def test_the_projection_of_pooled_text(bench: Bench, tmp_path: Path) -> None:
    pipeline = bench.pipeline("sdxl")
    made = factors(pipeline, ("text_projection", "attn2.to_k"), text=False)
    generator = torch.Generator().manual_seed(1)
    weight = pipeline.text_encoder_2.text_projection.weight
    pair = tuple(torch.randn(size, generator=generator) for size in ((RANK, weight.shape[1]), (len(weight), RANK)))
    made["text_encoder_2.text_projection"] = pair
    file = save(tmp_path / "a.safetensors", made, kohya("sdxl"), alpha=RANK)
    version = bench.compare("sdxl", file, merge(pipeline, made), name="kohya, text_projection", oracle="merged weights")
    assert version.manifest.compatibility.merged == ("text_encoder_2.text_projection",)


def test_four_channels_on_an_inpainting_base(bench: Bench, tmp_path: Path, inpainting: Path) -> None:
    made = factors(bench.pipeline("sd1"), ("conv_in", "attn1.to_q"), text=False)
    file = save(tmp_path / "a.safetensors", made, kohya("sd1"), alpha=SCALE * RANK)
    version = bench.publish("sd1", file)
    down, up = made["unet.conv_in"]
    padded = {**made, "unet.conv_in": (torch.cat([down, torch.zeros(RANK, 5, 3, 3)], 1), up)}
    plain, theirs = (inpaint(inpainting, each) for each in ({}, padded))
    pictures = {"images": {"photo": PHOTO, "mask": MASK}, "options": {"image": "photo", "mask": "mask"}}
    ours = bench.draw("inpainting", Adapter(ref=version.ref), **pictures)
    error = float((ours - theirs).abs().max())
    note("kohya, 4 channels on 9", "sd1", "merged weights", error, float((theirs - plain).abs().max()))
    stretched = load_file(file) | {"lora_unet_conv_in.dora_scale": torch.ones(len(up), 1, 1, 1)}
    save_file(stretched, tmp_path / "dora.safetensors")
    dora = bench.publish("sd1", tmp_path / "dora.safetensors")
    with pytest.raises(Incompatible, match="scales the base's weights"):
        bench.draw("inpainting", Adapter(ref=dora.ref), **pictures)


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = png(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
MASK = png(np.repeat(np.uint8([[0] * 32 + [255] * 32]), 64, 0))


def inpaint(folder: Path, made: Factors) -> Tensor:
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    merge(pipeline, made, SCALE)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            PLAIN["prompt"],
            image=Image.open(io.BytesIO(PHOTO)),
            mask_image=Image.open(io.BytesIO(MASK)),
            width=64,
            height=64,
            strength=1.0,
            num_inference_steps=PLAIN["steps"],
            guidance_scale=PLAIN["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(PLAIN["seed"]),
            output_type="latent",
        ).images
    return latents
