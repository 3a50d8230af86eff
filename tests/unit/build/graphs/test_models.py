"""A base's networks are diffusers' and transformers' own, by family, in the precision that they bear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scumble_build.graphs.families import FAMILIES
from scumble_build.graphs.models import Models, load_autoencoder, text_class, vae_dtype
from support.tiny_families import make_vae


def test_everything_is_loaded_in_the_precision_that_is_asked_for(tiny_base: Path) -> None:
    models = Models.load(tiny_base, FAMILIES["sd1"], torch.bfloat16)
    assert list(models.texts) == ["text_encoder"]
    assert {models.unet.dtype, models.vae.dtype, models.texts["text_encoder"].dtype} == {torch.bfloat16}


def test_sdxls_second_text_encoder_alone_projects() -> None:
    assert [text_class(part) for part in FAMILIES["sdxl"].texts] == [CLIPTextModel, CLIPTextModelWithProjection]
    assert [text_class(part) for part in FAMILIES["sd2"].texts] == [CLIPTextModel]


@pytest.mark.parametrize(
    ("upcast", "asked", "given"),
    [
        (True, torch.float16, torch.float32),
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.float16, torch.float16),
        (True, torch.float32, torch.float32),
    ],
)
def test_a_vae_that_overflows_half_precision_is_not_put_into_it(
    tmp_path: Path, upcast: bool, asked: torch.dtype, given: torch.dtype
) -> None:
    make_vae(seed=0, force_upcast=upcast).save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path, asked).dtype == given
    assert vae_dtype(AutoencoderKL.load_config(tmp_path), asked) == given
