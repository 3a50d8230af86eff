"""A base folder and LoRA files small enough to write in milliseconds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from scumble.cli import run
from scumble_registry import Registry
from scumble_registry.formats.safetensors_header import Array, write
from support.commands import Scumble

settings.register_profile("registry", deadline=None, max_examples=25)
settings.load_profile("registry")  # machines are shared; a test never times

WIDTH = 8
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "cross_attention_dim": WIDTH,
    "block_out_channels": [4],
    "layers_per_block": 1,
    "attention_head_dim": 1,
    "norm_num_groups": 2,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 20,
    "projection_dim": WIDTH,
}
_ENCODERS = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"

LoraWriter = Callable[..., Path]
BaseWriter = Callable[..., Path]


def save(path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write(tensors, metadata or {}))
    return path


def save_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture(autouse=True)
def _no_power_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power, and a killed process loses nothing that it wrote: save the disk's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry.open(home, create=True) as opened:
        yield opened


@cache
def shapes_of(kind: str, config: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of a model's tensors, as its own library saves them. Imports torch when a test first asks."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if kind.startswith("CLIP"):
            model = getattr(transformers, kind)(transformers.CLIPTextConfig(**json.loads(config)))
        else:
            model = getattr(diffusers, kind).from_config(json.loads(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save_model(folder: Path, kind: str, config: dict[str, Any], draw: np.random.Generator, prefix: str = "") -> None:
    """A whole model of random numbers with its config; `prefix` begins names that only old transformers had."""
    shapes = shapes_of(kind, json.dumps(config))
    names = {name: name if name.startswith((prefix, "text_projection")) else prefix + name for name in shapes}
    tensors = {names[name]: draw.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    save(folder / f"{'model' if kind.startswith('CLIP') else 'diffusion_pytorch_model'}.safetensors", tensors)
    save_json(folder / "config.json", config)


@pytest.fixture
def write_base(tmp_path: Path) -> BaseWriter:
    def write_folder(
        name: str = "base", seed: int = 0, prefix: str = "text_model.", width: int = WIDTH, encoders: int = 1
    ) -> Path:
        folder = tmp_path / name
        draw = np.random.default_rng(seed)
        save_model(folder / "unet", "UNet2DConditionModel", UNET | {"cross_attention_dim": width * encoders}, draw)
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        for kind, encoder in list(_ENCODERS.items())[:encoders]:
            save_model(folder / encoder, kind, TEXT | {"hidden_size": width}, draw, prefix)
            index[encoder] = ["transformers", kind]
        save_model(folder / "vae", "AutoencoderKL", VAE, draw)
        save_json(folder / "model_index.json", index)
        save_json(folder / "scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"})
        save_json(folder / "tokenizer/vocab.json", {"a": 0})
        return folder

    return write_folder


@pytest.fixture
def base(write_base: BaseWriter) -> Path:
    return write_base()


@pytest.fixture
def write_lora(tmp_path: Path) -> LoraWriter:
    """A LoRA in PEFT's layout: `write_lora("a.safetensors", seed=1, rank=2, metadata={…}, tensors={more})`."""

    def write_file(
        name: str = "lora.safetensors",
        seed: int = 0,
        rank: int = 2,
        metadata: dict[str, str] | None = None,
        tensors: dict[str, Array] | None = None,
    ) -> Path:
        draw = np.random.default_rng(seed)
        own = {
            f"{TO_Q}.lora_A.weight": draw.normal(size=(rank, 4)).astype(np.float32),
            f"{TO_Q}.lora_B.weight": draw.normal(size=(4, rank)).astype(np.float32),
            f"{Q_PROJ}.lora_A.weight": draw.normal(size=(rank, WIDTH)).astype(np.float32),
            f"{Q_PROJ}.lora_B.weight": draw.normal(size=(WIDTH, rank)).astype(np.float32),
        }
        return save(tmp_path / name, own | (tensors or {}), metadata)

    return write_file


@pytest.fixture
def lora(write_lora: LoraWriter) -> Path:
    return write_lora()


@pytest.fixture
def scumble(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scumble:
    """`status, stdout, stderr = scumble("ls", "--json")`, with SCUMBLE_HOME set and a wide terminal."""
    monkeypatch.setenv("SCUMBLE_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        try:
            status = run(["registry", *map(str, arguments)])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command
