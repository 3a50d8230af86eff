"""PEFT and diffusers themselves: what they save is what we read, and ΔW is PEFT's own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble_registry import Registry
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.lora import LoraModule, read_record
from scumble_registry.formats.lora.peft import match_pattern

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture(scope="module")
def text_encoder() -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    return transformers.CLIPTextModel(config)


@pytest.fixture(scope="module")
def base_folder(unet: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion folder, written by diffusers."""
    folder = tmp_path_factory.mktemp("base")
    tokens = {f"t{i}": i for i in range(60)} | {"<|startoftext|>": 60, "<|endoftext|>": 61}
    diffusers.StableDiffusionPipeline(
        unet=unet,
        text_encoder=text_encoder,
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        tokenizer=transformers.CLIPTokenizer(vocab=tokens, merges=[]),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def delta(module: LoraModule) -> Any:
    """alpha / r · up @ down, as the weight's shape."""
    product = module.up.reshape(len(module.up), -1) @ module.down.reshape(module.rank, -1)
    return module.scale * product.reshape(module.shape)


def adapt(model: Any, **config: Any) -> dict[str, Any]:
    """Add a random LoRA; returns PEFT's own ΔW of each module."""
    model.add_adapter(peft.LoraConfig(init_lora_weights=False, **config), adapter_name="ink")
    return {
        name: layer.get_delta_weight("ink").detach().numpy()
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn2.to_k": 8, "mid_block.*.to_q": 3}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn1.to_v": 2}, "alpha_pattern": {"to_out.0": 1}},
        {"r": 4, "lora_alpha": 2, "use_rslora": True},
    ],
    ids=["alpha pattern", "rank pattern", "rank-stabilised"],
)
def test_what_diffusers_saves_has_pefts_own_deltas(
    registry: Registry,
    unet: Any,
    text_encoder: Any,
    base_folder: Path,
    tmp_path: Path,
    config: dict[str, Any],
    dtype: str,
) -> None:
    unet, text_encoder = deepcopy(unet), deepcopy(text_encoder)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
    expected = {f"unet.{name}": d for name, d in adapt(unet, target_modules=targets, **config).items()}
    in_text = adapt(text_encoder, target_modules=["q_proj", "fc1"], r=2, lora_alpha=5)
    expected |= {f"text_encoder.text_model.{name}": d for name, d in in_text.items()}
    precision = getattr(torch, dtype)

    def state(model: Any) -> dict[str, Any]:
        found = peft.get_peft_model_state_dict(model, adapter_name="ink")
        return {key: value.to(precision) for key, value in found.items()}

    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=state(unet),
        text_encoder_lora_layers=state(text_encoder),
        unet_lora_adapter_metadata=unet.peft_config["ink"].to_dict(),
        text_encoder_lora_adapter_metadata=text_encoder.peft_config["ink"].to_dict(),
    )
    registry.publish(base_folder, "demo/base")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    version = registry.publish(file, "styles/ink", base="demo/base")
    record = read_record(registry.record_path(version))
    assert record.keys() == expected.keys()
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for name, module in record.items():
        assert module.down.dtype.name == dtype
        wide = LoraModule(module.down.astype(np.float32), module.up.astype(np.float32), module.alpha)
        np.testing.assert_allclose(delta(wide), expected[name], atol=tolerance * np.abs(expected[name]).max())


def test_the_targets_of_a_saved_base_are_the_modules_of_the_models(
    registry: Registry, unet: Any, text_encoder: Any, base_folder: Path
) -> None:
    found = registry.publish(base_folder, "demo/base").manifest.compatibility
    assert isinstance(found, BaseCompatibility)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)

    def shapes(model: Any, prefix: str) -> dict[str, tuple[int, ...]]:
        modules = model.named_modules()
        return {f"{prefix}.{n}": tuple(m.weight.shape) for n, m in modules if isinstance(m, kinds)}

    assert found.targets == shapes(unet, "unet") | shapes(text_encoder, "text_encoder.text_model")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"to_q": 1}, 1),
        ({"q": 1}, 0),
        ({"attn1.to_q": 1, "to_q": 2}, 1),
        ({"to_k": 1, ".*": 2}, 2),
        ({r"^down\.attn1\.to_q": 3}, 3),
        ({"attn1": 1}, 0),
    ],
)
def test_patterns_match_the_end_of_a_name_and_the_first_one_wins(patterns: dict[str, int], expected: int) -> None:
    assert match_pattern(patterns, "down.attn1.to_q", 0) == expected
