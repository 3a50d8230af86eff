"""Prompts in compel's language: what compel makes of diffusers' own text encoder is what rows read here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compel import Compel, DiffusersTextualInversionManager
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

import scumble_server.conditioning.text
from scumble.errors import InvalidRequest
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_server.conditioning.text import together
from scumble_server.prompts.compel import embed, read_compel
from scumble_server.prompts.tokens import PromptWord, Slot, Tokens
from support.tiny_sd import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from support.running import Running

STATES_TOLERANCE = 1e-4
TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
LONG = "q w e r t y. " * 15 + "(u i o p)1.3 " + "a s d f g. " * 8

PROMPTS = {
    "plain": "a red apple",
    "heavier": "a (red)1.4 apple++, [on a] (table (of wood)1.2)1.1",
    "lighter": "a (red apple)0.5 on a table-- and (a cat)0.8",
    "long": LONG,
    "long and lighter": LONG + "(z x c)0.4",
    "blend": '("a red apple", "a blue pear").blend(0.7, 0.3)',
    "long blend": f'("{LONG}", "a blue pear").blend(0.7, 0.3)',
    "and": '("a red apple", "a blue pear").and(1, 0.5)',
}


def request(prompt: str, *adapters: Adapter, **changes: Any) -> Request:
    return Request.parse({**PLAIN, "prompt": prompt, "adapters": adapters, "options": {"grammar": "compel"}, **changes})


def compelled(pipeline: StableDiffusionPipeline, prompt: str, negative: str) -> list[Tensor]:
    compel = Compel(
        pipeline.tokenizer,
        pipeline.text_encoder,
        DiffusersTextualInversionManager(pipeline),
        truncate_long_prompts=False,
    )
    with torch.inference_mode():
        made = [compel.build_conditioning_tensor(text) for text in (negative, prompt)]
        return list(compel.pad_conditioning_tensors_to_same_length(made))


def drawn(pipeline: StableDiffusionPipeline, negative: Tensor, prompt: Tensor) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        latents: Tensor = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            num_inference_steps=8,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="latent",
        ).images
    return latents


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The states that requests of this test read, one tensor a phase."""
    found: list[Tensor] = []

    def noted(texts: Any) -> Any:
        text = together(texts)
        found.append(text.states)
        return text

    monkeypatch.setattr(scumble_server.conditioning.text, "together", noted)
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_what_compel_says(running: Running, tiny_base: Path, read: list[Tensor], name: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    negative, prompt = compelled(pipeline, PROMPTS[name], "(blurry)1.2")
    ours = running.run([request(PROMPTS[name], negative_prompt="(blurry)1.2")])[0]
    assert (read[0] - torch.cat([negative, prompt])).abs().max() <= STATES_TOLERANCE
    assert (ours.latents - drawn(pipeline, negative, prompt)).abs().max() <= TOLERANCE
    if name != "plain":
        plain = running.run([request("a red apple", negative_prompt="(blurry)1.2")])[0]
        assert (ours.latents - plain.latents).abs().max() >= VISIBLE


def test_with_an_embedding_and_a_text_lora(
    running: Running, published: tuple[Path, dict[str, Path]], tmp_path: Path, read: list[Tensor]
) -> None:
    home, files = published
    torch.manual_seed(11)
    vectors = torch.randn(3, 32)
    save_file({"<pen>": vectors}, tmp_path / "pen.safetensors")
    with Registry.open(home) as registry:
        registry.publish(tmp_path / "pen.safetensors", "e/pen")
    pipeline = StableDiffusionPipeline.from_pretrained(files["base"], local_files_only=True)
    pipeline.load_lora_weights(files["l/a"], adapter_name="a")
    pipeline.set_adapters(["a"], [0.4])
    pipeline.load_textual_inversion({"<pen>": vectors}, token="<pen>")
    text = "a (<pen> drawing)1.3 of (a cat)0.6. " + LONG + "<pen>"
    negative, prompt = compelled(pipeline, text, "")
    ours = running.run([request(text, Adapter(ref="l/a", weight=0.4), Adapter(ref="e/pen"))])[0]
    assert (read[0] - torch.cat([negative, prompt])).abs().max() <= STATES_TOLERANCE
    assert (ours.latents - drawn(pipeline, negative, prompt)).abs().max() <= TOLERANCE
    assert [each.ref for each in ours.done.receipt.adapters] == ["l/a", "e/pen"]


def test_an_embedding_is_never_split() -> None:
    tokenizer, seen = tiny_tokenizer(), []

    def run(tokens: Tokens, _: Tensor | None) -> Tensor:
        seen.append(tokens.slots)
        return torch.zeros(1, 77, 1)

    names = [PromptWord("<pen>", 10)]
    prompt = read_compel(tokenizer, "x " * 70 + "<pen>" + " y" * 80, names, "prompt")
    assert (prompt.chunks, prompt.used) == (3, {0})
    embed(prompt, tokenizer, run)
    assert seen == [(), (Slot(0, 0, 1),), ()]


def test_strangers_of_all_grammars_share_a_batch(running: Running) -> None:
    mixed = [
        *(request(PROMPTS[name]) for name in ("lighter", "long", "and")),
        request("a (red:1.4) apple AND a pear", options={"grammar": "webui"}),
        request("a (red)1.4 apple", options={"grammar": "plain"}),
        request("a (red)1.4 apple", options={"grammar": "compel", "clip_skip": 1}),
    ]
    together = running.run(mixed)
    alone = [running.run([asked])[0] for asked in mixed]
    for i, one in enumerate(alone):
        assert (one.latents - together[i].latents).abs().max() <= TOLERANCE
        assert all((one.latents - other.latents).abs().max() >= VISIBLE for other in alone[:i])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a cat.swap(dog)", "swap"),
        ("a cat withLora(ink, 0.5)", "name the LoRA in adapters"),
        ('("a", "b").blend(1)', "mismatched"),
        ("(" * 60 + "a", "too deep"),
        ("x " * 700, "10 chunks"),
        ("x" * 10_001, "10001 characters"),
    ],
)
def test_what_compel_cannot_read_is_refused_at_the_edge(running: Running, prompt: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        running.run([request(prompt)])
    assert caught.value.fields["field"] == "prompt"


def test_open_brackets_do_not_take_for_ever(running: Running) -> None:
    running.run([request("(" * 20 + "a", steps=1)])
