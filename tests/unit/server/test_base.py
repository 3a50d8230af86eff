"""Several bases on one server: requests name one, weights come and go under the budget, pictures stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import scumble_build.graphs.denoiser
from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter, Request
from scumble_build.graphs.families import FAMILIES
from scumble_registry import Registry
from scumble_server.executors.torch.executor import TorchExecutor, weights_bytes
from scumble_server.memory.residency import Residency
from support.broken_models import unchecked, without
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from support.running import Running

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 6, "guidance_scale": 5.0, "width": 64, "height": 64}
BASES = ("tiny/base", "tiny/sd2", "tiny/sdxl")


def request(base: str | None, **changes: Any) -> Request:
    return Request.parse({**PLAIN, "base": base, **changes})


@pytest.fixture(scope="module")
def home(tiny_base: Path, make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, files = tmp_path_factory.mktemp("bases"), tmp_path_factory.mktemp("files")
    folders = (tiny_base, make_tiny_sd2(files / "sd2"), make_tiny_sdxl(files / "sdxl"))
    with Registry.open(home, create=True) as registry:
        for name, folder in zip(BASES, folders, strict=True):
            registry.publish(folder, name=name)
            registry.publish(make_lora(folder, files / "lora" / name, seed=1), name=f"lora/{name[5:]}", base=name)
    return home


@pytest.fixture(scope="module")
def all_three(home: Path, start: Callable[..., Running]) -> Iterator[Running]:
    running = start(home, BASES[0], {}, more_bases=BASES[1:])
    yield running
    running.service.close()


def requests() -> list[Request]:
    return [
        request(base, adapters=adapters, seed=seed)
        for seed, base in enumerate(BASES)
        for adapters in ((), (Adapter(ref=f"lora/{base[5:]}", weight=0.7),))
    ]


def test_requests_for_three_bases_at_once_equal_themselves_alone(all_three: Running) -> None:
    together = all_three.run(requests())
    for asked, found in zip(requests(), together, strict=True):
        alone = all_three.run([asked])[0]
        assert (found.latents - alone.latents).abs().max() <= 1e-4
        assert found.done.receipt.base.name == asked.base
    assert all_three.run([request(None)])[0].done.receipt.base.name == BASES[0]


def test_under_a_budget_for_one_they_take_turns_and_stay_the_same(
    all_three: Running, home: Path, start: Callable[..., Running]
) -> None:
    budget = max(base.nbytes for base in all_three.service.bases)
    few = start(home, BASES[0], {}, more_bases=BASES[1:], weights_cache_bytes=budget)
    for _ in range(2):
        for ours, theirs in zip(few.run(requests()), all_three.run(requests()), strict=True):
            assert (ours.latents - theirs.latents).abs().max() <= 1e-4
    stats = few.service.stats().weights_cache
    few.service.close()
    assert stats.bytes <= budget
    assert stats.evictions >= 4


def test_a_base_that_does_not_fit_is_refused_at_the_start(home: Path, start: Callable[..., Running]) -> None:
    with pytest.raises(Refused, match="bytes of weight memory, the budget is 1000"):
        start(home, BASES[0], {}, weights_cache_bytes=1000)


def test_one_that_is_not_served_is_refused_with_those_that_are(home: Path, start: Callable[..., Running]) -> None:
    two = start(home, BASES[0], {}, more_bases=BASES[1:2])
    with pytest.raises(Refused, match=r"serves tiny/base@1, tiny/sd2@1, not tiny/sdxl@1"):
        two.run([request(BASES[2])])
    two.service.close()


@pytest.mark.parametrize("field", ["prompt_2", "original_size", "crop"])
def test_what_only_sdxl_reads_is_refused_elsewhere(all_three: Running, field: str) -> None:
    value = "a boat" if field == "prompt_2" else (32, 32)
    with pytest.raises(InvalidRequest, match=rf"options\.{field} is for SDXL"):
        all_three.run([request(BASES[1], options={field: value})])
    changed = all_three.run([request(BASES[2], options={field: value})])[0]
    assert (changed.latents - all_three.run([request(BASES[2])])[0].latents).abs().max() >= 0.01


def test_what_shares_memory_is_evicted_together() -> None:
    weights = Residency(10, "weight")
    with weights.open() as lease:
        lease.get("base", 6, object)
        lease.get("variant", 2, object, of="base")
        lease.get("of the variant", 1, object, of="variant")
    with weights.open() as lease:
        lease.get("another", 5, object)
        assert weights.stats().entries == 1
        assert weights.stats().bytes == 5


def test_bytes_are_told_before_loading(all_three: Running) -> None:
    for base in all_three.service.bases:
        states = base.load().graphs.states  # type: ignore[attr-defined]
        loaded = sum(tensor.nbytes for state in states.values() for tensor in state.values() if torch.is_tensor(tensor))
        assert base.nbytes == loaded


@pytest.mark.parametrize(("precision", "kept"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_a_vae_that_overflows_half_precision_stays_in_float32(home: Path, precision: str, kept: torch.dtype) -> None:
    with Registry.open(home) as registry:
        folder = registry.materialise(registry.resolve("tiny/sdxl"))
    executor = TorchExecutor.load(folder, FAMILIES["sdxl"], "cpu", precision)
    assert executor.vae._model.dtype == kept
    assert executor.graphs.denoiser.unet.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert weights_bytes(folder, FAMILIES["sdxl"], precision) == sum(
        tensor.nbytes for state in executor.graphs.states.values() for tensor in state.values()
    )


@pytest.mark.parametrize(("base", "dtype"), [("tiny/base", torch.bfloat16), ("tiny/sd2", torch.float32)])
def test_attention_is_in_float32_where_the_model_asks_for_it(
    home: Path, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, base: str, dtype: torch.dtype
) -> None:
    seen: set[torch.dtype] = set()
    attend = scumble_build.graphs.denoiser.scaled_dot_product_attention

    def watched(query: Tensor, *rest: Any) -> Tensor:
        seen.add(query.dtype)
        return attend(query, *rest)

    monkeypatch.setattr(scumble_build.graphs.denoiser, "scaled_dot_product_attention", watched)
    running = start(home, base, {}, precision="bf16")
    running.run([request(base)])
    running.service.close()
    assert seen == {dtype}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd2_of_either_prediction_equals_diffusers(
    prediction: Literal["epsilon", "v_prediction"], tmp_path: Path, start: Callable[..., Running]
) -> None:
    folder = make_tiny_sd2(tmp_path / "base", prediction)
    with Registry.open(tmp_path / "home", create=True) as registry:
        published = registry.publish(folder, name="tiny/sd2")
    assert published.manifest.compatibility.prediction_type == prediction  # type: ignore[union-attr]
    running = start(tmp_path / "home", "tiny/sd2", {})
    asked = request("tiny/sd2", negative_prompt="blue")
    ours = running.run([asked])[0].latents
    running.service.close()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs = pipeline(
        asked.prompt,
        negative_prompt="blue",
        num_inference_steps=6,
        guidance_scale=5.0,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max() <= 1e-3


@pytest.mark.parametrize("zero", [True, False])
def test_absent_and_empty_negative_prompts_are_as_in_diffusers(
    tmp_path: Path, start: Callable[..., Running], *, zero: bool
) -> None:
    folder = make_tiny_sdxl(tmp_path / "base", zero_negative=zero)
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(folder, name="tiny/sdxl")
    running = start(tmp_path / "home", "tiny/sdxl", {})
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    found = []
    for negative in (None, ""):
        options = {"prompt_2": "a boat", "original_size": (100, 90), "crop": (4, 8), "target_size": (80, 72)}
        asked = request("tiny/sdxl", negative_prompt=negative, options=options, scheduler="euler")
        found.append(running.run([asked])[0].latents)
        theirs = pipeline(
            asked.prompt,
            prompt_2="a boat",
            negative_prompt=negative,
            num_inference_steps=6,
            guidance_scale=5.0,
            width=64,
            height=64,
            original_size=(90, 100),
            crops_coords_top_left=(8, 4),
            target_size=(72, 80),
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="latent",
        ).images
        assert (found[-1] - theirs).abs().max() <= 1e-3
    running.service.close()
    assert (bool((found[0] - found[1]).abs().max() >= 0.01)) == zero


@pytest.fixture(scope="module")
def broken(home: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Publish a base that lacks a norm, as it could be before that was refused."""
    file, norm = "unet/diffusion_pytorch_model.safetensors", "conv_norm_out.weight"
    folder = without(tiny_base, tmp_path_factory.mktemp("broken") / "base", file, norm)
    with Registry.open(home) as registry, unchecked():
        return registry.publish(folder, name="tiny/broken").digest


def test_a_base_that_cannot_load_keeps_no_other_from_being_served(
    home: Path, start: Callable[..., Running], broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = start(home, "tiny/broken", {}, more_bases=(BASES[0], BASES[1]))
    try:
        assert "the base tiny/broken is not served" in caplog.text
        assert running.service.stats().bases == ["tiny/base@1", "tiny/sd2@1"]
        assert running.service.stats().base == "tiny/broken@1"
        drawn = running.run([request(name) for name in BASES[:2]])
        assert [result.done.receipt.base.name for result in drawn] == list(BASES[:2])
        says = rf"tiny/broken@1 could not be loaded.*{broken}.*unet lacks 1 tensor.*: conv_norm_out\.weight"
        for name in ("tiny/broken", "tiny/broken@1", None):
            with pytest.raises(Refused, match=says):
                running.run([request(name)])
        with pytest.raises(Refused, match=r"serves tiny/base@1, tiny/sd2@1, not tiny/sdxl@1"):
            running.run([request(BASES[2])])
    finally:
        running.service.close()


def test_without_any_base_that_can_load_the_start_fails(home: Path, start: Callable[..., Running], broken: str) -> None:
    with pytest.raises(Refused, match=rf"tiny/broken@1 \({broken}\) cannot be loaded: unet lacks 1 tensor"):
        start(home, "tiny/broken", {})
    with pytest.raises(Refused, match="cannot be loaded"):
        start(home, "tiny/broken", {}, more_bases=("tiny/nowhere",))
