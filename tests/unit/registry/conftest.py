"""A base folder and LoRA files small enough to write in milliseconds: no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
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
    "conv_in.weight": (4, 4, 3, 3),
    "conv_in.bias": (4,),
    "down_blocks.0.attentions.0.proj_in.weight": (4, 4, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (4, 4),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, WIDTH),
    "mid_block.resnets.0.norm1.weight": (4,),
}
TEXT = {
    "encoder.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "encoder.layers.0.layer_norm1.weight": (WIDTH,),
    "embeddings.token_embedding.weight": (20, WIDTH),
}
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


@pytest.fixture
def write_base(tmp_path: Path) -> BaseWriter:
    def write_folder(name: str = "base", seed: int = 0, prefix: str = "text_model.") -> Path:
        folder = tmp_path / name
        draw = np.random.default_rng(seed)
        half = {key: draw.normal(size=shape).astype(np.float16) for key, shape in UNET.items()}
        text = {prefix + key: draw.normal(size=shape).astype(np.float16) for key, shape in TEXT.items()}
        save(folder / "unet/diffusion_pytorch_model.safetensors", half)
        save(folder / "text_encoder/model.safetensors", text)
        save(folder / "vae/diffusion_pytorch_model.safetensors", {"conv.weight": np.ones((1, 1), np.float16)})
        save_json(
            folder / "model_index.json",
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": ["transformers", "CLIPTextModel"],
            },
        )
        unet = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": WIDTH, "in_channels": 4}
        save_json(folder / "unet/config.json", unet | {"sample_size": 16})
        vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8, 8, 8]}
        save_json(folder / "vae/config.json", vae)
        save_json(folder / "text_encoder/config.json", {"hidden_size": WIDTH})
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
