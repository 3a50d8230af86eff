"""DoRA: at strength 1 as diffusers has it; otherwise, and for several, as merged weights by the written formula.

PEFT normalises anew at each strength and feeds one DoRA to the next, so it is an oracle for one at strength 1 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scumble.request import Adapter, Request
from scumble_registry import Registry
from support.oracle import changed_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.running import Running

pytestmark = pytest.mark.every_executor
PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 8, "guidance_scale": 5.0, "width": 64, "height": 64}
FILES = ("dora/one", "dora/two", "dora/columns")


def request(*adapters: Adapter, **changes: Any) -> Request:
    return Request.parse({**PLAIN, "adapters": adapters, **changes})


@pytest.fixture(scope="module")
def files(
    running: Running, make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Two DoRAs of PEFT's making, one on every layer, and one of kohya's on columns."""
    base, folder = running.files["base"], tmp_path_factory.mktemp("dora")
    made = {
        "dora/one": with_weight_suffix(make_lora(base, folder / "one", seed=31, dora=True)),
        "dora/two": make_lora(base, folder / "two", seed=32, dora=True, full=True, text=False),
        "dora/columns": make_columns(base, folder / "columns.safetensors"),
    }
    with Registry.open(running.home) as registry:
        for name, file in made.items():
            registry.publish(file, name=name, base="tiny/base")
    running.files.update(made)
    return made


def with_weight_suffix(file: Path) -> Path:
    """diffusers drops a text encoder's magnitudes unless their names end so (both endings are in use)."""
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = {
        f"{name}.weight" if name.startswith("text") and name.endswith("magnitude_vector") else name: values
        for name, values in load_file(file).items()
    }
    save_file(tensors, file, metadata)
    return file


def make_columns(base: Path, file: Path) -> Path:
    """kohya's layout with `dora_scale` by column, on a linear layer, a 1x1 and a 3x3 convolution each."""
    unet = StableDiffusionPipeline.from_pretrained(base, local_files_only=True).unet
    generator = torch.Generator().manual_seed(33)
    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_k", "proj_in", "conv1", "ff.net.2")):
            weight = module.weight
            key = f"lora_unet_{name.replace('.', '_')}"
            ones = (1,) * (weight.ndim - 2)
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, *weight.shape[1:], generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, *ones, generator=generator) * 0.3
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
            norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
            norms = norms * (1 + 0.4 * torch.randn(len(norms), generator=generator))
            tensors[f"{key}.dora_scale"] = norms.view(1, -1, *ones).detach()
    save_file(tensors, file)
    return file


def merged(base: Path, parts: list[tuple[Path, float]]) -> StableDiffusionPipeline:
    """W + Σ wⱼ (W'ⱼ − W), W' = m (W + ΔW) / ‖W + ΔW‖ (FORMATS: strength of DoRA)."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    changes: dict[Any, Tensor] = {}
    for file, strength in parts:
        for weight, changed in changed_weights(pipeline, load_file(file)):
            changes[weight] = changes.get(weight, 0) + strength * (changed - weight.detach())
    for weight, change in changes.items():
        weight.data += change
    return pipeline


@pytest.mark.parametrize("name", ["dora/one", "dora/two"])
def test_one_at_strength_one_equals_diffusers(
    running: Running, files: dict[str, Path], diffusers_alone: Callable[..., Any], name: str
) -> None:
    asked = request(Adapter(ref=name))
    ours, reference = running.run([asked])[0], diffusers_alone({**running.files, **files}, asked)
    assert (ours.latents - reference.latents).abs().max() <= 1e-3
    plain = diffusers_alone(running.files, request(), merged(running.files["base"], []))
    assert (reference.latents - plain.latents).abs().max() >= 0.05


@pytest.mark.parametrize(
    "parts",
    [
        [("dora/one", 0.4)],
        [("dora/columns", 1.0)],
        [("dora/one", 0.5), ("dora/two", -0.3)],
        [("dora/columns", 0.6), ("dora/two", 0.4), ("dora/one", 0.2)],
    ],
    ids=lambda parts: " and ".join(f"{name} at {weight}" for name, weight in parts),
)
def test_strengths_and_several_equal_merged_weights(
    running: Running, files: dict[str, Path], diffusers_alone: Callable[..., Any], parts: list[tuple[str, float]]
) -> None:
    ours = running.run([request(*(Adapter(ref=name, weight=weight) for name, weight in parts))])[0]
    pipeline = merged(running.files["base"], [(files[name], weight) for name, weight in parts])
    reference = diffusers_alone(running.files, request(), pipeline)
    assert (ours.latents - reference.latents).abs().max() <= 1e-3
    backwards = running.run([request(*(Adapter(ref=name, weight=weight) for name, weight in parts[::-1]))])[0]
    assert (ours.latents - backwards.latents).abs().max() <= 1e-3, "their order does not matter"
    bare = diffusers_alone(running.files, request(), merged(running.files["base"], []))
    assert (reference.latents - bare.latents).abs().max() >= 0.05


@pytest.mark.usefixtures("files")
def test_strangers_with_and_without_stretches_share_a_batch(running: Running) -> None:
    requests = [
        request(Adapter(ref="dora/two", weight=0.3), seed=1),
        request(Adapter(ref="l/a", weight=0.3), seed=2),
        request(Adapter(ref="dora/columns", weight=0.5, start=0.4), seed=3, guidance_scale=1.0),
        request(seed=4),
        request(Adapter(ref="dora/one", weight=0.3), Adapter(ref="l/full", weight=0.2), seed=5),
    ]
    for each, together in zip(requests, running.run(requests), strict=True):
        assert (together.latents - running.run([each])[0].latents).abs().max() <= 1e-3


def test_base_weights_are_only_read(running: Running, files: dict[str, Path]) -> None:
    before = running.executor.weights_digest()
    running.run([request(Adapter(ref=name, weight=0.7)) for name in files])
    assert running.executor.weights_digest() == before
