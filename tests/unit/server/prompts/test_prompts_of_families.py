"""Long prompts and grammars where the base has two text encoders (SDXL) or pads otherwise (SD 2.x)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from scumble.errors import InvalidRequest
from scumble.request import Request
from scumble_registry import Registry
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from support.running import Running

TOLERANCE = 1e-3
VISIBLE = 20 * TOLERANCE
PLAIN = {"seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
PARTS = ["q w e r t " * 15, "y u i o p " * 4]


def request(prompt: str, grammar: str = "plain", **changes: Any) -> Request:
    """With SDXL's own scheduler, if nothing else is said."""
    options = {"grammar": grammar} | changes.pop("options", {})
    return Request.parse({**PLAIN, "scheduler": "euler", "prompt": prompt, "options": options, **changes})


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Running]:
    yield from served(make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base"), tmp_path_factory, start)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Running]:
    yield from served(make_tiny_sd2(tmp_path_factory.mktemp("sd2") / "base"), tmp_path_factory, start)


def served(folder: Path, temporary: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Running]:
    home = temporary.mktemp("home")
    with Registry.open(home, create=True) as registry:
        registry.publish(folder, name="tiny/base")
    running = start(home, "tiny/base", {"base": folder})
    yield running
    running.service.close()


def pipeline_of(running: Running) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(running.files["base"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, **given: Any) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(7)
    about = {"num_inference_steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64, "output_type": "latent"}
    with torch.inference_mode():
        latents: Tensor = pipeline(generator=generator, **about, **given).images
    return latents


def encoded(pipeline: Any, *texts: str) -> tuple[Tensor, Tensor]:
    """By diffusers' own encode_prompt, each text in a chunk of its own; what is pooled is the first one's."""
    with torch.inference_mode():
        made = [pipeline.encode_prompt(text, do_classifier_free_guidance=False) for text in texts]
    return torch.cat([states for states, *_ in made], dim=1), made[0][2]


def test_a_long_prompt_of_sdxl(sdxl: Running) -> None:
    pipeline = pipeline_of(sdxl)
    (prompt, pooled), (negative, negative_pooled) = encoded(pipeline, *PARTS), encoded(pipeline, "blurry", "")
    given = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    against = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    expected = drawn(pipeline, **given, **against)
    ours = sdxl.run([request("".join(PARTS), negative_prompt="blurry")])[0].latents
    assert (ours - expected).abs().max() <= TOLERANCE
    zeros = {name: torch.zeros_like(values) for name, values in against.items()}
    absent = sdxl.run([request("".join(PARTS))])[0].latents
    assert (absent - drawn(pipeline, **given, **zeros)).abs().max() <= TOLERANCE
    assert (absent - expected).abs().max() >= VISIBLE


def test_clip_skip_of_sdxl(sdxl: Running) -> None:
    expected = drawn(pipeline_of(sdxl), prompt="a pear", negative_prompt="blurry", clip_skip=1)
    asked = request("a pear", negative_prompt="blurry", options={"clip_skip": 1})
    assert (sdxl.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
    plain = sdxl.run([request("a pear", negative_prompt="blurry")])[0].latents
    assert (plain - expected).abs().max() >= VISIBLE


def test_changing_words_of_sdxl(sdxl: Running) -> None:
    pipeline = pipeline_of(sdxl)
    negative, negative_pooled = encoded(pipeline, "blurry")
    (cat, cat_pooled), (dog, dog_pooled) = encoded(pipeline, "a cat"), encoded(pipeline, "a dog")
    later = {
        "prompt_embeds": torch.cat([negative, dog]),
        "add_text_embeds": torch.cat([negative_pooled, dog_pooled]),
    }
    expected = drawn(
        pipeline,
        prompt_embeds=cat,
        pooled_prompt_embeds=cat_pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        callback_on_step_end=lambda _pipeline, step, _timestep, state: state | (later if step >= 2 else {}),
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds"],
    )
    ours = sdxl.run([request("a [cat:dog:3]", "webui", negative_prompt="blurry")])[0].latents
    assert (ours - expected).abs().max() <= TOLERANCE


def test_two_halves_of_a_prompt_are_the_whole(sdxl: Running) -> None:
    whole, halves = (
        sdxl.run([request(prompt, "webui")])[0].latents for prompt in ("a cat", "a cat :0.3 AND a cat :0.7")
    )
    assert (whole - halves).abs().max() <= TOLERANCE


def test_compel_of_sdxl(sdxl: Running) -> None:
    pipeline = pipeline_of(sdxl)
    with torch.inference_mode():
        made = CompelForSDXL(pipeline)("a (red)1.4 apple and (a cat)0.6", negative_prompt="(blurry)1.2")
    expected = drawn(
        pipeline,
        prompt_embeds=made.embeds,
        pooled_prompt_embeds=made.pooled_embeds,
        negative_prompt_embeds=made.negative_embeds,
        negative_pooled_prompt_embeds=made.negative_pooled_embeds,
    )
    asked = request("a (red)1.4 apple and (a cat)0.6", "compel", negative_prompt="(blurry)1.2")
    assert (sdxl.run([asked])[0].latents - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("grammar", ["webui", "compel"])
def test_a_second_prompt_is_plain_text(sdxl: Running, grammar: str) -> None:
    with pytest.raises(InvalidRequest, match="set grammar to plain"):
        sdxl.run([request("a cat", grammar, options={"prompt_2": "a dog"})])


def test_a_long_prompt_of_sd2(sd2: Running) -> None:
    """It pads with another sign than the end of the text."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd2.files["base"], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        prompt, negative = (
            torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in texts], dim=1)
            for texts in (PARTS, ("blurry", ""))
        )
    expected = drawn(pipeline, prompt_embeds=prompt, negative_prompt_embeds=negative)
    ours = sd2.run([request("".join(PARTS), negative_prompt="blurry", scheduler="ddim")])[0].latents
    assert (ours - expected).abs().max() <= TOLERANCE
