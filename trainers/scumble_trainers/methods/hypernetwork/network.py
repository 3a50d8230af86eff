"""Initialises the network and writes its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from scumble_build.graphs.predictor import Predictor
from scumble_registry.formats.hypernetwork.predictor import PredictorConfig, write_record
from scumble_registry.formats.safetensors_header import Array
from scumble_trainers.base import TrainingBase
from scumble_trainers.data.vision import encoder_folder
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings
from scumble_trainers.settings import StoredType

FILE = "hypernetwork.safetensors"

STORED = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
DOWN_NORM = 3**-0.5
"""Initial length of a predicted down row: that of a new LoRA's, which are uniform in ±1/√in."""


def new_predictor(
    settings: HypernetworkSettings, layers: Mapping[str, nn.Linear], condition_width: int, encoder: str | None
) -> Predictor:
    """Initialise a network from torch's generator. Its predicted up factors are zero, so it changes nothing yet."""
    config = PredictorConfig(
        condition="image",
        encoder=encoder,
        width=settings.width,
        heads=settings.heads,
        depth=settings.depth,
        passes=settings.passes,
        rank=settings.rank,
        a=settings.a,
        b=settings.b,
        alpha=settings.scale_alpha,
        targets=list(layers),
    )
    up = {name: _orthogonal(layer.out_features, config.a) for name, layer in layers.items()}
    down = {name: _orthogonal(config.b, layer.in_features) for name, layer in layers.items()}
    predictor = Predictor(config, condition_width, up, down)
    ups = config.a * config.rank
    with torch.no_grad():
        predictor.head.weight[:ups] = 0
        predictor.head.bias[:ups] = 0
        predictor.head.weight[ups:] *= DOWN_NORM * (3 / config.b) ** 0.5  # its inputs have norm √width
        predictor.head.bias[ups:] = torch.randn(config.rank * config.b) * DOWN_NORM * config.b**-0.5
    return predictor


def save_predictor(predictor: Predictor, file: Path, dtype: StoredType) -> None:
    """Write the file that the registry reads, every tensor in `dtype`."""
    record = predictor.record()
    network, up, down = (_stored(part, dtype) for part in (record.network, record.up, record.down))
    file.write_bytes(write_record(replace(record, network=network, up=up, down=down)))


def encoder_digest(base: TrainingBase) -> str | None:
    """Return `sha256:…` of the image encoder's weights; None if they are several files."""
    files = sorted(encoder_folder(base, None).glob("*.safetensors"))
    if len(files) != 1:
        return None
    with files[0].open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _stored(arrays: Mapping[str, Array], dtype: StoredType) -> dict[str, Array]:
    return {name: values.astype(STORED[dtype]) for name, values in arrays.items()}


def _orthogonal(rows: int, columns: int) -> Tensor:
    """Return a matrix whose shorter side is orthonormal, rounded to numbers that every file dtype can represent."""
    return nn.init.orthogonal_(torch.empty(rows, columns)).bfloat16().float()
