"""The networks of a base, from a folder in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scumble_build.graphs.families import Family, TextPart

TextModel: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True, slots=True)
class Models:
    """The networks as diffusers and transformers load them, not yet adapted; `texts` by folder name."""

    unet: UNet2DConditionModel
    texts: Mapping[str, TextModel]
    vae: AutoencoderKL

    @classmethod
    def load(cls, folder: Path, family: Family, dtype: torch.dtype) -> Models:
        texts = {
            part.encoder: text_class(part).from_pretrained(folder / part.encoder, dtype=dtype, local_files_only=True)
            for part in family.texts
        }
        return cls(
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, local_files_only=True),
            texts,
            load_autoencoder(folder / "vae", dtype),
        )


def text_class(part: TextPart) -> type[TextModel]:
    return CLIPTextModelWithProjection if part.projects else CLIPTextModel


def load_autoencoder(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE from a folder in the diffusers layout."""
    config = AutoencoderKL.load_config(folder, local_files_only=True)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=vae_dtype(config, dtype), local_files_only=True)


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a VAE that overflows float16 and says so in its config (SDXL's), else `dtype`."""
    return torch.float32 if config.get("force_upcast") and dtype == torch.float16 else dtype
