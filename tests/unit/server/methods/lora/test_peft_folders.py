"""PEFT's own folders (`save_pretrained`), of every method that is served, drawn as PEFT itself draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from scumble.errors import Refused

if TYPE_CHECKING:
    from support.lora_bench import Bench

pytestmark = pytest.mark.oracle
TARGETS = ["attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.2", "proj_in"]
WITH_CONVOLUTIONS = [*TARGETS, "conv1", "downsamplers.0.conv", "time_emb_proj"]
FACTORS: dict[str, Any] = {"r": 4, "target_modules": WITH_CONVOLUTIONS}
CONFIGS: dict[str, tuple[Any, float]] = {
    "LoRA with patterns": (
        peft.LoraConfig(
            lora_alpha=6,
            rank_pattern={"attn1.to_q": 2, "conv1": 3},
            alpha_pattern={"attn2.to_k": 9, "mid_block.*.to_v": 1},
            **FACTORS,
        ),
        0.15,
    ),
    "LoRA, rank-stabilised": (peft.LoraConfig(lora_alpha=2, use_rslora=True, **FACTORS), 0.15),
    "LoRA with biases": (
        peft.LoraConfig(lora_alpha=4, lora_bias=True, r=4, target_modules=["ff.net.2", "proj_out"]),
        0.2,
    ),
    "DoRA": (peft.LoraConfig(lora_alpha=4, use_dora=True, **FACTORS), 0.15),
    "LoHa": (peft.LoHaConfig(alpha=3, rank_pattern={"conv1": 2}, **{**FACTORS, "r": 3}), 0.3),
    "LoHa, effective convolutions": (
        peft.LoHaConfig(alpha=3, use_effective_conv2d=True, **{**FACTORS, "r": 2}),
        0.4,
    ),
    "LoKr": (peft.LoKrConfig(alpha=3, r=1, decompose_factor=4, target_modules=TARGETS), 0.3),
    "LoKr, whole matrices": (peft.LoKrConfig(alpha=12, r=24, target_modules=TARGETS), 0.3),
    "OFT": (
        peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=TARGETS),
        0.2,
    ),
    "OFT, Neumann's series": (
        peft.OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=True, target_modules=TARGETS),
        0.1,
    ),
    "OFT, shared blocks": (
        peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, block_share=True, target_modules=TARGETS),
        0.2,
    ),
    "BOFT": (peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=TARGETS), 0.3),
    "IA³": (
        peft.IA3Config(target_modules=["to_k", "to_v", "ff.net.2", "time_emb_proj"], feedforward_modules=["ff.net.2"]),
        0.5,
    ),
}
IN_TEXT = {
    "LoRA": (peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]), 0.2),
    "IA³": (
        peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
        0.5,
    ),
}


def adapt(model: Any, config: Any, strength: float, folder: Path) -> Any:
    """A PEFT model with random numbers, which saved itself."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if not any(part in name for part in ("lora_", "hada_", "lokr_", "oft_", "boft_", "ia3_")):
            continue
        noise = torch.randn(parameter.shape, generator=generator) * strength
        if "magnitude" in name or "ia3_" in name or "boft_s" in name:
            parameter.data *= 1 + noise
        else:
            parameter.data = noise
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_the_unet(bench: Bench, tmp_path: Path, name: str, family: str) -> None:
    config, strength = CONFIGS[name]
    pipeline = bench.pipeline(family)
    pipeline.unet = adapt(pipeline.unet, config, strength, tmp_path / "adapter").base_model.model
    bench.compare(family, folder(tmp_path), pipeline, name=f"{name} (PEFT folder)", oracle="PEFT")


@pytest.mark.parametrize("name", IN_TEXT)
def test_folders_of_unet_and_text_encoder(bench: Bench, tmp_path: Path, name: str) -> None:
    pipeline = bench.pipeline("sd1")
    config, strength = CONFIGS["LoRA, rank-stabilised"]
    pipeline.unet = adapt(pipeline.unet, config, strength, tmp_path / "adapter" / "unet").base_model.model
    config, strength = IN_TEXT[name]
    text = adapt(pipeline.text_encoder, config, strength, tmp_path / "adapter" / "text_encoder")
    pipeline.text_encoder = text.base_model.model
    bench.compare("sd1", folder(tmp_path), pipeline, name=f"{name} of text (PEFT folder)", oracle="PEFT")


def folder(tmp_path: Path) -> Path:
    """PEFT writes a model card with the path that the base came from; nobody publishes that."""
    for card in (tmp_path / "adapter").rglob("README.md"):
        card.unlink()
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (peft.VeraConfig(r=4, target_modules=["attn1.to_q"]), "peft_type 'VERA'"),
        (peft.OFTConfig(r=0, oft_block_size=4, coft=True, target_modules=["attn1.to_q"]), "coft"),
        (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["conv1"]), "differs from its own merged"),
    ],
    ids=["VeRA", "constrained OFT", "OFT of convolutions"],
)
def test_what_cannot_be_drawn_is_refused_by_name(bench: Bench, tmp_path: Path, config: Any, says: str) -> None:
    adapt(bench.pipeline("sd1").unet, config, 0.1, tmp_path / "adapter")
    with pytest.raises(Refused, match=says):
        bench.publish("sd1", folder(tmp_path))
