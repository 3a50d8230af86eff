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
from scumble_build.graphs.loading import load_whole

TextModel: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True, slots=True)
class Models:
    """The networks as diffusers and transformers load them, not yet adapted; `texts` by folder name."""

    unet: UNet2DConditionModel
    texts: Mapping[str, TextModel]
    vae: AutoencoderKL

    @classmethod
    def load(cls, folder: Path, family: Family, dtype: torch.dtype) -> Models:
        """Load a base strictly. Raises Refused, naming component and tensors, if it is not whole."""
        texts = {part.encoder: load_whole(text_class(part), folder / part.encoder, dtype) for part in family.texts}
        return cls(
            load_whole(UNet2DConditionModel, folder / "unet", dtype),
            texts,
            load_autoencoder(folder / "vae", dtype),
        )


def text_class(part: TextPart) -> type[TextModel]:
    return CLIPTextModelWithProjection if part.projects else CLIPTextModel


def load_autoencoder(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE strictly from a folder in the diffusers layout. Raises Refused."""
    config = AutoencoderKL.load_config(folder, local_files_only=True)
    return load_whole(AutoencoderKL, folder, vae_dtype(config, dtype))


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a VAE that overflows float16 and says so in its config (SDXL's), else `dtype`."""
    return torch.float32 if config.get("force_upcast") and dtype == torch.float16 else dtype
