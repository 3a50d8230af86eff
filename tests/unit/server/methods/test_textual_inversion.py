"""Embeddings per request equal diffusers' `load_textual_inversion`, which grows its tokenizer and table. Ours stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from scumble.errors import Incompatible, InvalidRequest, Refused, ScumbleError
from scumble.request import Adapter, Request
from scumble_registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from support.running import Running

LATENT_TOLERANCE = 1e-3
VISIBLE = 50 * LATENT_TOLERANCE
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
WIDTH = 32

pytestmark = [pytest.mark.usefixtures("embeddings"), pytest.mark.every_executor]

Files = dict[str, "Path"]


def request(*adapters: Adapter, **changes: Any) -> Request:
    return Request.parse({**PLAIN, "adapters": adapters, **changes})


@pytest.fixture(scope="module")
def embeddings(published: tuple[Path, Files], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """`e/cat` and `e/other` (one vector for `<cat>`), `e/bad` (two for `<bad>`), `e/ink` (three for `ink`)."""
    home, files = published
    folder = tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(11)
    made = {
        "e/cat": {"<cat>": torch.randn(WIDTH)},
        "e/other": {"<cat>": torch.randn(1, WIDTH)},
        "e/bad": {"<bad>": torch.randn(2, WIDTH).half()},
        "e/ink": {"emb_params": torch.randn(3, WIDTH)},
        "e/wide": {"<wide>": torch.randn(2, 48)},
    }
    with Registry.open(home) as registry:
        for name, tensors in made.items():
            file = folder / f"{name.removeprefix('e/')}.safetensors"
            save_file(tensors, file)
            registry.publish(file, name)
            files[name] = file
    return files


def diffusers_with(files: Files, asked: Request) -> StableDiffusionPipeline:
    """The base with every adapter of `asked` loaded by diffusers."""
    pipeline = StableDiffusionPipeline.from_pretrained(files["base"], local_files_only=True)
    names = []
    for adapter in asked.adapters:
        if adapter.ref.startswith("l/"):
            names.append(f"a{len(names)}")
            pipeline.load_lora_weights(files[adapter.ref], adapter_name=names[-1])
            continue
        ((key, vectors),) = load_file(files[adapter.ref]).items()
        token = adapter.token or ("ink" if key == "emb_params" else key)
        pipeline.load_textual_inversion({token: vectors.float() * adapter.weight}, token=token)
    if names:
        loras = [adapter for adapter in asked.adapters if adapter.ref.startswith("l/")]
        pipeline.set_adapters(names, [adapter.weight for adapter in loras])
    return pipeline


CAT, OTHER, BAD, INK = (Adapter(ref=f"e/{name}") for name in ("cat", "other", "bad", "ink"))
CASES = {
    "one vector": request(CAT, prompt="a red <cat> asleep"),
    "three vectors": request(INK, prompt="a red apple in ink on paper", scheduler="euler"),
    "in the negative prompt": request(BAD, negative_prompt="blurry <bad> hands"),
    "two embeddings": request(CAT, INK, prompt="a <cat> in ink", scheduler="dpmpp_2m", steps=11),
    "beside signs, twice": request(CAT, INK, prompt="(<cat>), a (ink) and <cat>.", negative_prompt="ink, red"),
    "with LoRAs of the text encoder": request(
        Adapter(ref="l/a", weight=0.3),
        CAT,
        Adapter(ref="l/b", weight=0.2),
        BAD,
        prompt="a <cat>",
        negative_prompt="<bad>",
    ),
    "half as strong": request(Adapter(ref="e/ink", weight=0.5), prompt="an apple in ink"),
    "by another token": request(Adapter(ref="e/cat", token="sks"), prompt="a photo of sks dog"),
}


@pytest.mark.parametrize("name", CASES)
def test_alone_equals_diffusers(running: Running, embeddings: Files, diffusers_alone: Any, name: str) -> None:
    asked = CASES[name]
    ours = running.run([asked])[0]
    bare = asked.model_copy(update={"adapters": ()})
    reference = diffusers_alone(embeddings, bare, diffusers_with(embeddings, asked))
    assert (ours.latents - reference.latents).abs().max() <= LATENT_TOLERANCE
    loras = tuple(adapter for adapter in asked.adapters if adapter.ref.startswith("l/"))
    without = asked.model_copy(update={"adapters": loras})
    plain = diffusers_alone(embeddings, bare, diffusers_with(embeddings, without))
    assert (reference.latents - plain.latents).abs().max() >= VISIBLE, "the oracle shows nothing"
    assert ours.done.receipt.dropped == ()
    assert [each.ref for each in ours.done.receipt.adapters] == [each.ref for each in asked.adapters]


def test_strangers_with_other_embeddings_for_the_same_token_share_a_batch(running: Running) -> None:
    prompt = "a red <cat> in ink"
    mixed = [
        request(prompt=prompt),
        request(CAT, prompt=prompt),
        request(OTHER, prompt=prompt),
        request(OTHER, INK, Adapter(ref="l/a", weight=0.3), prompt=prompt),
        request(Adapter(ref="e/ink", token="<cat>"), prompt=prompt, negative_prompt="<cat>"),
    ]
    before = running.service.stats().mixed_steps
    together = running.run(mixed)
    assert running.service.stats().mixed_steps > before
    alone = [running.run([each])[0] for each in mixed]
    for batched, one in zip(together, alone, strict=True):
        assert (batched.latents - one.latents).abs().max() <= LATENT_TOLERANCE
    for i, one in enumerate(alone):
        for other in alone[:i]:
            assert (one.latents - other.latents).abs().max() >= VISIBLE


def test_tokenizer_and_table_stay_as_they_are(running: Running) -> None:
    base = running.service.bases[0]
    tokens, digest = base.tokenizers[0].get_vocab(), running.executor.weights_digest()
    bare = running.run([request(prompt="a <cat> in ink")])[0]
    running.run([request(CAT, INK, prompt="a <cat> in ink", steps=1) for _ in range(5)])
    assert base.tokenizers[0].get_vocab() == tokens
    assert running.executor.weights_digest() == digest
    assert torch.equal(running.run([request(prompt="a <cat> in ink")])[0].latents, bare.latents)


def test_the_receipt_says_what_stands_for_what(running: Running) -> None:
    asked = request(
        CAT,
        Adapter(ref="e/ink", token="<hand>"),
        Adapter(ref="e/bad", weight=0),
        Adapter(ref="e/other", token="<nowhere>"),
        prompt="a <cat> <hand>",
        negative_prompt="y <hand> z",
        steps=2,
    )
    receipt = running.run([asked])[0].done.receipt
    assert [(each.ref, each.details["token"], each.details["vectors"]) for each in receipt.adapters] == [
        ("e/cat", "<cat>", 1),
        ("e/ink", "<hand>", 3),
    ]
    assert [(each.ref, each.reason) for each in receipt.dropped] == [
        ("e/bad", "weight 0"),
        ("e/other", "its token '<nowhere>' occurs in no prompt (prompt or negative prompt)"),
    ]
    again = Request.parse(receipt.to_json()["request"])
    assert again.adapters == asked.adapters


def test_weight_zero_leaves_the_word_as_plain_text(running: Running) -> None:
    bare = running.run([request(prompt="a <cat>")])[0]
    for adapter in (Adapter(ref="e/cat", weight=0), Adapter(ref="e/cat", text_weight=0), INK):
        result = running.run([request(adapter, prompt="a <cat>")])[0]
        assert torch.equal(result.latents, bare.latents)
        assert [each.ref for each in result.done.receipt.dropped] == [adapter.ref]


def test_a_negative_prompt_that_is_not_read_counts_for_nothing(running: Running) -> None:
    result = running.run([request(BAD, negative_prompt="<bad>", guidance_scale=1.0, steps=1)])[0]
    assert "occurs in no prompt (prompt)" in result.done.receipt.dropped[0].reason


@pytest.mark.parametrize(
    ("adapters", "error", "says"),
    [
        ([Adapter(ref="e/wide")], Incompatible, "48"),
        ([CAT, OTHER], InvalidRequest, "both stand for '<cat>'"),
        ([CAT, Adapter(ref="e/ink", token="<CAT>")], InvalidRequest, "another token"),
        ([Adapter(ref="e/cat", start=0.5)], InvalidRequest, "start"),
        ([Adapter(ref="e/cat", end=0.5)], InvalidRequest, "end"),
        ([Adapter(ref="e/cat", blocks={"BASE": 0.5})], InvalidRequest, "blocks"),
        ([Adapter(ref="l/a", token="ink")], InvalidRequest, "token"),
    ],
)
def test_bad_input_is_refused_at_the_edge(
    running: Running, adapters: list[Adapter], error: type[ScumbleError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        running.run([request(*adapters)])
    assert isinstance(caught.value, Refused) or caught.value.fields["field"].startswith("adapters.")


@pytest.mark.parametrize("bad", [{"weight": float("nan")}, {"token": ""}, {"token": " "}, {"token": "x" * 201}])
def test_bad_fields_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(bad))):
        Request.parse({**PLAIN, "adapters": [{"ref": "e/cat", **bad}]})
