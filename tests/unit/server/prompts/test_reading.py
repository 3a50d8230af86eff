"""Prompts with a grammar, and long ones, as whole requests: diffusers draws from embeddings made by hand."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from scumble.errors import InvalidRequest, ScumbleError
from scumble.redraw import request_from_receipt
from scumble.request import Adapter, Request
from scumble_registry import Registry
from support.control_nets import load_unet, make_net

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from support.running import Running

TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}


def request(prompt: str = "a red apple", grammar: str = "plain", **changes: Any) -> Request:
    options = {"grammar": grammar} | changes.pop("options", {})
    return Request.parse({**PLAIN, "prompt": prompt, "options": options, **changes})


class Oracle:
    """diffusers' pipeline, whose text encoder is asked directly, chunk by chunk."""

    def __init__(self, base: Path) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
        self.pipeline.set_progress_bar_config(disable=True)

    def chunks(self, *texts: str) -> Tensor:
        """`(n, 77, C)`: each text in its own chunk, as transformers' tokenizer pads it."""
        tokens = self.pipeline.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt")
        assert tokens.input_ids.shape[1] == 77, "a text of the oracle is too long for its chunk"
        with torch.inference_mode():
            states: Tensor = self.pipeline.text_encoder(tokens.input_ids)[0]
        return states

    def states(self, *texts: str) -> Tensor:
        """`(1, n·77, C)`."""
        return self.chunks(*texts).flatten(0, 1)[None]

    def parted(self, text: str) -> list[str]:
        """Every 75 letters or signs, which are a token each."""
        signs = [sign for sign in text if sign != " "]
        return [" ".join(signs[start : start + 75]) for start in range(0, len(signs), 75)]

    def draw(self, prompt: Tensor, negative: Tensor, **more: Any) -> Tensor:
        with torch.inference_mode():
            latents: Tensor = self.pipeline(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                num_inference_steps=8,
                guidance_scale=5.0,
                width=64,
                height=64,
                generator=torch.Generator("cpu").manual_seed(7),
                output_type="latent",
                **more,
            ).images
        return latents


@pytest.fixture(scope="module")
def base(make_tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlike a fresh model's, its text states have means: emphasis restores them."""
    folder = make_tiny_base(tmp_path_factory.mktemp("base") / "base")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    torch.manual_seed(3)
    with torch.no_grad():
        encoder.final_layer_norm.weight += 0.3 * torch.randn(32)
        encoder.final_layer_norm.bias += 0.3 * torch.randn(32) + 0.1
    encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def running(
    base: Path,
    make_lora: Callable[..., Path],
    start: Callable[..., Running],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("files")
    make_net(load_unet(base), 1).save_pretrained(folder / "net")
    files = {
        "l/a": make_lora(base, folder / "a", seed=1),
        "l/b": make_lora(base, folder / "b", seed=2, rank=12),
        "c/net": folder / "net",
    }
    with Registry.open(home, create=True) as registry:
        registry.publish(base, name="tiny/base")
        for name, path in files.items():
            registry.publish(path, name=name, base="tiny/base")
    started = start(home, "tiny/base", files | {"base": base})
    yield started
    started.service.close()


@pytest.fixture(scope="module")
def oracle(base: Path) -> Oracle:
    return Oracle(base)


def check(running: Running, asked: Request, expected: Tensor) -> None:
    assert (running.run([asked])[0].latents - expected).abs().max() <= TOLERANCE
    other = asked.model_copy(update={"prompt": "a red apple", "negative_prompt": None})
    assert (running.run([other])[0].latents - expected).abs().max() >= VISIBLE, "the oracle shows nothing"


LETTERS = "q w e r t y " * 30 + "u i o p"
"""184 tokens, for each is a word of its own."""


@pytest.mark.parametrize("grammar", ["plain", "webui"])
def test_a_long_prompt_is_read_to_its_end(running: Running, oracle: Oracle, grammar: str) -> None:
    prompt, nothing = oracle.parted(LETTERS), [""] * 3
    assert len(prompt) == 3
    expected = oracle.draw(oracle.states(*prompt), oracle.states(*nothing))
    check(running, request(LETTERS, grammar), expected)


def test_a_long_negative_prompt_is_read_to_its_end(running: Running, oracle: Oracle) -> None:
    expected = oracle.draw(oracle.states("a red apple", ""), oracle.states(*oracle.parted("q w " * 50)))
    check(running, request(negative_prompt="q w " * 50), expected)


def test_breaks_and_commas_end_chunks(running: Running, oracle: Oracle) -> None:
    first, rest = "q w " * 30 + ",", "e r " * 10
    expected = oracle.draw(oracle.states(first, rest, "an apple"), oracle.states("", "", ""))
    check(running, request(first + rest + "BREAK an apple", "webui"), expected)


@pytest.mark.parametrize("emphasis", ["original", "no_norm"])
def test_emphasis_is_what_the_formula_says(running: Running, oracle: Oracle, emphasis: str) -> None:
    """z·w, and then z·mean(before)/mean(after), each chunk for itself; here the first one alone has weights."""
    states = oracle.chunks("a ab c", "d")
    weights = torch.ones(77)
    weights[2:4], weights[4] = 1.5, 1 / 1.1
    weighted = states[0] * weights[:, None]
    if emphasis == "original":
        weighted = weighted * (states[0].mean() / weighted.mean())
    prompt = torch.cat([weighted, states[1]])[None]
    asked = request("a (ab:1.5) [c] BREAK d", "webui", options={"emphasis": emphasis})
    check(running, asked, oracle.draw(prompt, oracle.states("", "")))


def test_plain_text_knows_no_grammar(running: Running, diffusers_alone: Callable[..., Any]) -> None:
    asked = request("a (red:1.5) [apple|pear] AND BREAK <lora:l/a:1>")
    assert (running.run([asked])[0].latents - diffusers_alone(running.files, asked).latents).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layers", [1, 2])
def test_clip_skip_is_that_of_diffusers(running: Running, base: Path, layers: int) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    encoder = pipeline.text_encoder
    # diffusers asks for its norm where transformers had it before 5.6.
    object.__setattr__(encoder, "text_model", encoder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    with torch.inference_mode():
        expected = pipeline(
            prompt="a pear",
            negative_prompt="blurry",
            num_inference_steps=8,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=generator,
            clip_skip=layers,
            output_type="latent",
        ).images
    check(running, request("a pear", negative_prompt="blurry", options={"clip_skip": layers}), expected)


def test_clip_skip_of_the_webui_holds_for_the_negative_prompt_too(running: Running) -> None:
    plain, webui = (
        running.run([request("a pear", grammar, negative_prompt="blurry", options={"clip_skip": 1})])[0].latents
        for grammar in ("plain", "webui")
    )
    assert (plain - webui).abs().max() >= VISIBLE


STEPS = {
    "editing": ("a [cat:dog:3] in [red:.5]", ["a cat in "] * 3 + ["a dog in "] + ["a dog in red"] * 4),
    "alternation": ("a [cat|dog|]", ["a cat", "a dog", "a "] * 2 + ["a cat", "a dog"]),
}


@pytest.mark.parametrize("name", STEPS)
def test_texts_change_from_step_to_step(running: Running, oracle: Oracle, name: str) -> None:
    """diffusers' own callback hands its loop other embeddings."""
    prompt, texts = STEPS[name]
    embeddings = [torch.cat([oracle.states("blurry"), oracle.states(text)]) for text in texts]

    def change(_pipeline: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"prompt_embeds": embeddings[min(step + 1, 7)]}

    expected = oracle.draw(
        oracle.states(texts[0]),
        oracle.states("blurry"),
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    check(running, request(prompt, "webui", negative_prompt="blurry"), expected)


def test_the_negative_prompt_changes_too(running: Running) -> None:
    changing = running.run([request("a cat", "webui", negative_prompt="[red|]")])[0].latents
    for negative in ("red", ""):
        fixed = running.run([request("a cat", "webui", negative_prompt=negative)])[0].latents
        assert (changing - fixed).abs().max() >= VISIBLE


def test_each_text_is_encoded_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    executor = running.executor
    encode = executor.encode

    def counted(index: int, inputs: Any) -> Any:
        asked.append(len(inputs.tokens))
        return encode(index, inputs)

    monkeypatch.setattr(executor, "encode", counted)
    running.run([request("[jug|mug] AND jug", "webui", negative_prompt="nothing of the kind")])
    assert asked == [1, 1, 1]
    running.run([request("a mug, a jug", "webui", negative_prompt="nothing of the kind")])
    assert asked == [1] * 4, "what another request has read is still there"


def composed(oracle: Oracle, parts: Sequence[tuple[str, float]], guidance: float) -> Tensor:
    """eps = uncond + Σ wᵢ·g·(condᵢ − uncond), each prompt by a run of its own."""
    pipeline = oracle.pipeline
    scheduler, unet = pipeline.scheduler, pipeline.unet
    negative, prompts = oracle.states(""), [(oracle.states(text), weight) for text, weight in parts]
    scheduler.set_timesteps(8)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(7)) * scheduler.init_noise_sigma
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(latents, timestep)
            without = unet(sample, timestep, negative).sample
            noise = without.clone()
            for states, weight in prompts:
                noise += guidance * weight * (unet(sample, timestep, states).sample - without)
            latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_and_is_a_sum_of_prompts(running: Running, oracle: Oracle, guidance: float) -> None:
    expected = composed(oracle, [("a cat", 1.0), ("a dog", -0.4), ("q", 0.7)], guidance)
    check(running, request("a cat AND a dog :-0.4 AND q:0.7", "webui", guidance_scale=guidance), expected)


def test_a_single_prompt_may_have_a_weight(running: Running, oracle: Oracle) -> None:
    check(running, request("a cat :0.6", "webui"), composed(oracle, [("a cat", 0.6)], 5.0))


def encoded_noise() -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def test_strangers_of_all_lengths_share_a_batch(running: Running) -> None:
    net, images = Adapter(ref="c/net", images="map", weight=0.6), {"map": encoded_noise()}
    mixed = [
        request(),
        request("a cup", adapters=[net], images=images),
        request(LETTERS, adapters=[net], images=images),
        request("a cat AND a dog", "webui", adapters=[net.model_copy(update={"mode": "guess"})], images=images),
        request(LETTERS, adapters=[Adapter(ref="l/a", weight=0.3)]),
        request("a cat AND a dog BREAK q AND w :0.5", "webui", num_images=2),
        request("a [cat|" + LETTERS + "]", "webui", adapters=[Adapter(ref="l/b", weight=0.1, start=0.4)]),
        request("a (cat:1.4)", "webui", guidance_scale=1.0, options={"clip_skip": 1}),
        request(negative_prompt="q w " * 50, scheduler="euler"),
    ]
    before = running.service.stats().mixed_steps
    together = running.run(mixed)
    assert running.service.stats().mixed_steps > before
    for asked, found in zip(mixed, together, strict=True):
        assert (running.run([asked])[0].latents - found.latents).abs().max() <= TOLERANCE


def test_tags_are_adapters(running: Running) -> None:
    options = {"lora_tags": True}
    tagged = request("a cat<lora:l/a:0.2:0.4> AND a dog <lora:l/b:0.1>", "webui", options=options)
    named = [Adapter(ref="l/a", weight=0.4, text_weight=0.2), Adapter(ref="l/b", weight=0.1, text_weight=0.1)]
    first = running.run([tagged])[0]
    second = running.run([request("a cat AND a dog ", "webui", adapters=named)])[0]
    assert torch.equal(first.latents, second.latents)
    receipt = first.done.receipt
    assert [(each.ref, each.weight, each.text_weight) for each in receipt.adapters] == [
        ("l/a", 0.4, 0.2),
        ("l/b", 0.1, 0.1),
    ]
    again = running.run([request_from_receipt(receipt)])[0]
    assert torch.equal(first.latents, again.latents), "the receipt has what the tags stood for"


BAD: list[tuple[Request, type[ScumbleError], str, str]] = [
    (request("x " * 601), InvalidRequest, "9 chunks", "prompt"),
    (request(negative_prompt="BREAK " * 9, grammar="webui"), InvalidRequest, "9 chunks", "negative_prompt"),
    (request(" AND ".join("abcdefghi"), "webui"), InvalidRequest, "joins 9", "prompt"),
    (request("<lora:l/a:1>", "webui"), InvalidRequest, "lora_tags", "prompt"),
    (request("<lora:a:1>", "webui", options={"lora_tags": True}), InvalidRequest, "no reference", "prompt"),
    (
        request("a", "webui", negative_prompt="<lora:l/a:1>", options={"lora_tags": True}),
        InvalidRequest,
        "in the prompt alone",
        "negative_prompt",
    ),
    (request(options={"lora_tags": True}), InvalidRequest, "set grammar to webui", "options.lora_tags"),
    (request(options={"emphasis": "no_norm"}), InvalidRequest, "set grammar to webui", "options.emphasis"),
    (request(options={"clip_skip": 3}), InvalidRequest, "has 2", "options.clip_skip"),
]


@pytest.mark.parametrize(("asked", "error", "says", "field"), BAD)
def test_what_cannot_be_read_is_refused_at_the_edge(
    running: Running, asked: Request, error: type[ScumbleError], says: str, field: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        running.run([asked])
    assert caught.value.fields["field"] == field


def test_too_many_texts_are_refused(running: Running) -> None:
    words = "[" + "|".join(f"w{i}" for i in range(70)) + "]"
    with pytest.raises(InvalidRequest, match="71 different texts"):
        running.run([request(words, "webui", steps=100)])
    running.run([request("[a|b]", "webui", steps=70)])


@pytest.mark.parametrize(
    "options",
    [{"grammar": "sd"}, {"clip_skip": 0}, {"clip_skip": 13}, {"emphasis": "none"}, {"lora_tags": "perhaps"}],
)
def test_unknown_values_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        Request.parse({**PLAIN, "options": options})
