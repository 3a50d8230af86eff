"""Which files of a repository are needed, on the listings of well-known ones."""

from __future__ import annotations

import pytest

from scumble.errors import InvalidRequest, NotFound
from scumble_registry.sources.hub_files import choose

SD15 = [
    ".gitattributes",
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "model_index.json",
    "safety_checker/config.json",
    "safety_checker/model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_of_a_pipeline_each_component_with_its_best_weights() -> None:
    assert choose(SD15, "") == [
        "feature_extractor/preprocessor_config.json",
        "model_index.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_file_and_a_folder_of_it_can_be_named() -> None:
    assert choose(SD15, "v1-5-pruned.safetensors") == ["v1-5-pruned.safetensors"]
    assert choose(SD15, "vae") == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("weights", "needed"),
    [
        (["a.bin", "a.fp16.safetensors"], ["a.fp16.safetensors"]),
        (["a.bin", "a.fp16.bin"], ["a.bin"]),
        (["a.safetensors", "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], ["a.safetensors"]),
        (["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], None),
        (["a.non_ema.safetensors", "a.bin"], ["a.bin"]),
        (["other.safetensors"], ["other.safetensors"]),
        (["other.pth", "other.msgpack", "model.onnx"], ["other.pth"]),
    ],
)
def test_of_one_model_s_folder_the_best_weights(weights: list[str], needed: list[str] | None) -> None:
    names = [name.replace("a", "diffusion_pytorch_model", 1) if name[0] == "a" else name for name in weights]
    best = [name.replace("a", "diffusion_pytorch_model", 1) if name[0] == "a" else name for name in needed or weights]
    assert choose([*names, "config.json", "README.md"], "") == sorted([*best, "config.json"])


def test_peft_s_folder_is_its_config_and_its_weights() -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt"]
    assert choose(names, "") == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_cannot_be_guessed_is_asked_for() -> None:
    h94 = [
        "models/ip-adapter_sd15.bin",
        "models/ip-adapter_sd15.safetensors",
        "models/ip-adapter-plus_sd15.safetensors",
    ]
    with pytest.raises(InvalidRequest, match=r"2 files of weights.*ip-adapter-plus_sd15\.safetensors"):
        choose(h94, "")
    assert choose(h94, "", ["models/*plus*"]) == ["models/ip-adapter-plus_sd15.safetensors"]
    with pytest.raises(InvalidRequest, match="no file of weights"):
        choose(["README.md"], "")
    with pytest.raises(NotFound, match=r"it has README\.md"):
        choose(["README.md"], "sub")
