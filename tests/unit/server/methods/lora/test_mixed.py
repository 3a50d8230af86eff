"""Algorithms side by side in one file, adapters side by side on one layer, at any strength: W + Σ wⱼ (W'ⱼ − W)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble.request import Adapter
from scumble_registry.formats.lora.record import read_record
from scumble_registry.formats.lora.serving import serving
from support.formats_table import note
from support.tiny_lycoris import ALGORITHMS, adapt, save, state
from support.tiny_variant import make_checkpoint

if TYPE_CHECKING:
    from support.lora_bench import Bench

pytestmark = pytest.mark.oracle
LAYERS = {
    "attn1.to_q": "LoHa",
    "attn1.to_k": "LoKr",
    "attn1.to_v": "LoHa of high rank",
    "attn1.to_out.0": "DoRA",
    "attn2.to_q": "IA³",
    "attn2.to_k": "LoKr, whole matrices",
    "attn2.to_v": "GLoRA",
    "attn2.to_out.0": "OFT, constrained and rescaled",
    "ff.net.0.proj": "DoRA on LoHa of high rank",
    "ff.net.2": "BOFT",
    "time_emb_proj": "DoRA by columns",
    "self_attn.q_proj": "LoHa",
    "self_attn.v_proj": "DoRA on LoKr",
    "mlp.fc1": "OFT",
}
"""How a linear layer's name ends → LyCORIS' algorithm for it."""
OTHERS = {"attn1.to_out.0": "full", "attn2.to_v": "DoRA", "attn1.to_q": "OFT"}
"""Others for some of them."""
Changes = dict[nn.Module, tuple[Tensor, ...]]
"""By layer, what is added to its weight and to its bias."""


def make(pipeline: Any, file: Path, seed: int, *, algorithms: dict[str, str] = LAYERS) -> tuple[Path, Changes]:
    """A file of many algorithms, and by layer W' − W, read off what LyCORIS' forward makes of a unit matrix."""
    tensors: dict[str, Tensor] = {}
    changes: Changes = {}
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        model = getattr(pipeline, component)
        for end, algorithm in algorithms.items():
            chosen = {name: layer for name, layer in model.named_modules() if name.endswith(end)}
            before = {layer: affine(layer) for layer in chosen.values()}
            made = adapt(ALGORITHMS[algorithm], chosen, seed)
            for layer in chosen.values():
                changes[layer] = tuple(after - old for after, old in zip(affine(layer), before[layer], strict=True))
            for module in made.values():
                module.restore()
            tensors |= state(made, lambda name, prefix=prefix: prefix + name.replace(".", "_"))  # type: ignore[misc]
    return save(file, tensors), changes


def affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of what a linear layer does now, whoever does it."""
    with torch.no_grad():
        bias = layer(torch.zeros(1, layer.in_features))[0]
        return (layer(torch.eye(layer.in_features)) - bias).T, bias


def merged(*parts: tuple[float, Changes]) -> None:
    for weight, changes in parts:
        for layer, (of_weight, of_bias) in changes.items():
            layer.weight.data += weight * of_weight
            if layer.bias is not None:
                layer.bias.data += weight * of_bias


@pytest.mark.parametrize("weight", [1.0, 0.6, -0.3])
def test_many_algorithms_in_one_file(bench: Bench, tmp_path: Path, weight: float) -> None:
    pipeline = bench.pipeline("sd1")
    file, changes = make(pipeline, tmp_path / "a.safetensors", 1)
    merged((weight, changes))
    version = bench.compare(
        "sd1",
        file,
        pipeline,
        name=f"nine algorithms in one file, at {weight:g}",
        oracle="merged weights",
        weight=weight,
    )
    with_classes = {
        (LAYERS[next(end for end in LAYERS if target.endswith(end))], serving(target, module))
        for target, module in read_record(record_path(bench, version)).items()
    }
    assert ("LoHa", "row") in with_classes
    assert ("LoKr, whole matrices", "variant") in with_classes
    assert ("GLoRA", "row with gain") in with_classes
    assert version.manifest.compatibility.merged


def record_path(bench: Bench, version: Any) -> Path:
    return bench.running.service._registry.record_path(version)  # type: ignore[no-any-return]


def test_several_on_the_same_layers_each_against_the_base(bench: Bench, tmp_path: Path) -> None:
    pipeline = bench.pipeline("sd1")
    one, of_one = make(
        pipeline,
        tmp_path / "1.safetensors",
        1,
        algorithms={end: LAYERS[end] for end in ("attn1.to_out.0", "attn2.to_v", "ff.net.2")},
    )
    two, of_two = make(pipeline, tmp_path / "2.safetensors", 2, algorithms=OTHERS)
    merged((0.7, of_one), (0.5, of_two))
    refs = [bench.publish("sd1", file).ref for file in (one, two)]
    adapters = [Adapter(ref=ref, weight=weight) for ref, weight in zip(refs, (0.7, 0.5), strict=True)]
    theirs, plain = bench.reference("sd1", pipeline), bench.reference("sd1", bench.pipeline("sd1"))
    for order in (adapters, adapters[::-1]):
        error = float((bench.draw("sd1", *order) - theirs).abs().max())
        note("two files on the same layers", "sd1", "merged weights", error, float((theirs - plain).abs().max()))


def test_blocks_start_and_end_reach_what_is_merged(bench: Bench, tmp_path: Path) -> None:
    file, _ = make(
        bench.pipeline("sd1"), tmp_path / "a.safetensors", 3, algorithms={"ff.net.2": "BOFT", "time_emb_proj": "DoRA"}
    )
    ref = bench.publish("sd1", file).ref
    none = {"down_blocks": 0.0, "mid_block": 0.0, "up_blocks": 0.0}

    def draw(*adapters: Adapter) -> Tensor:
        return bench.draw("sd1", *adapters, steps=6)

    whole, plain, begun = draw(Adapter(ref=ref)), draw(), draw(Adapter(ref=ref, end=0.34))
    assert (draw(Adapter(ref=ref, blocks=none)) - plain).abs().max() <= 1e-5
    assert (begun - plain).abs().max() >= 0.02
    assert (begun - whole).abs().max() >= 0.02


def test_it_stacks_on_a_checkpoint(bench: Bench, tmp_path: Path) -> None:
    folder = make_checkpoint(bench.folders["sd1"], tmp_path / "checkpoint", seed=1)
    checkpoint = bench.publish("sd1", folder)
    bench.folders["checkpoint"] = folder
    pipeline = bench.pipeline("checkpoint")
    file, changes = make(pipeline, tmp_path / "a.safetensors", 4)
    merged((0.8, changes))
    ref = bench.publish("sd1", file).ref
    ours = bench.draw("sd1", Adapter(ref=checkpoint.ref), Adapter(ref=ref, weight=0.8))
    theirs = bench.diffusers_alone({"base": folder}, bench.request("sd1"), pipeline).latents
    alone = bench.diffusers_alone({"base": folder}, bench.request("sd1"), bench.pipeline("checkpoint")).latents
    error = float((ours - theirs).abs().max())
    note("nine algorithms on a checkpoint", "sd1", "merged weights", error, float((theirs - alone).abs().max()))


def test_strangers_with_and_without_share_the_base_as_it_was(bench: Bench, tmp_path: Path) -> None:
    file, _ = make(bench.pipeline("sd1"), tmp_path / "a.safetensors", 5)
    ref = bench.publish("sd1", file).ref
    before = bench.running.executor_of("base/sd1").weights_digest()
    asked = [
        bench.request("sd1", *adapters, seed=seed)
        for seed, adapters in enumerate([(Adapter(ref=ref),), (), (Adapter(ref=ref, weight=0.5),), ()])
    ]
    for one, together in zip(asked, bench.running.run(asked), strict=True):
        assert (together.latents - bench.running.run([one])[0].latents).abs().max() <= 1e-4
    assert bench.running.executor_of("base/sd1").weights_digest() == before


def test_kohyas_oft_is_always_clamped(bench: Bench, tmp_path: Path) -> None:
    """W'ₖ = Rₖᵀ Wₖ for blocks of rows, R = (I + Q)(I − Q)⁻¹, Q = B − Bᵀ cut to the norm α · out over all blocks."""
    generator, pipeline = torch.Generator().manual_seed(1), bench.pipeline("sd1")
    tensors: dict[str, Tensor] = {}
    for name, layer in pipeline.unet.named_modules():
        if not name.endswith(("attn1.to_q", "attn2.to_v", "conv1")):
            continue
        out = layer.weight.shape[0]
        blocks = torch.randn(out // 8, 8, 8, generator=generator)
        alpha = 0.02 if name.endswith("to_q") else 0.1
        q = blocks - blocks.transpose(1, 2)
        q = q * (alpha * out / q.norm()).clamp(max=1)
        turned = (torch.eye(8) + q) @ torch.linalg.inv(torch.eye(8) - q)
        rows = layer.weight.data.unflatten(0, (-1, 8))
        layer.weight.data = torch.einsum("knm,kn...->km...", turned, rows).flatten(0, 1)
        key = f"oft_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.oft_blocks": blocks, f"{key}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "oft.safetensors")
    bench.compare("sd1", tmp_path / "oft.safetensors", pipeline, name="OFT (kohya)", oracle="merged weights")


def test_old_files_of_glora_and_oft(bench: Bench, tmp_path: Path) -> None:
    """LyCORIS' earlier spellings: GLoRA with its pairs the other way round, OFT's rotation itself."""
    generator, pipeline = torch.Generator().manual_seed(2), bench.pipeline("sd1")
    tensors: dict[str, Tensor] = {}
    for name, layer in pipeline.unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if name.endswith("ff.net.0.proj"):
            out, into = layer.weight.shape
            shapes = {"a1": (2, into), "a2": (into, 2), "b1": (2, into), "b2": (out, 2)}
            a1, a2, b1, b2 = (0.2 * torch.randn(shape, generator=generator) for shape in shapes.values())
            for part, values in zip(shapes, (a1, a2, b1, b2), strict=True):
                tensors[f"{key}.{part}.weight"] = values
            layer.weight.data += layer.weight.data @ a2 @ a1 + b2 @ b1
        elif name.endswith("attn1.to_v"):
            rows = layer.weight.data.unflatten(0, (-1, 4))
            turned = torch.linalg.qr(torch.randn(len(rows), 4, 4, generator=generator))[0]
            tensors[f"{key}.oft_diag"] = turned.contiguous()
            layer.weight.data = torch.einsum("knm,kn...->km...", turned, rows).flatten(0, 1)
    save_file(tensors, tmp_path / "old.safetensors")
    bench.compare(
        "sd1", tmp_path / "old.safetensors", pipeline, name="GLoRA and OFT, old files", oracle="merged weights"
    )
