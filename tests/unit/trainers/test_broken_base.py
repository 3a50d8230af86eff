"""A base that is not whole is refused before it is trained on, with the tensor that it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from scumble.errors import Refused
from scumble_trainers.base import find_base, load_base
from support.broken_models import without


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_norm_out.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
        ("text_encoder/model.safetensors", "final_layer_norm.bias"),
    ],
)
def test_what_a_base_lacks_is_not_made_up(tiny_base: Path, tmp_path: Path, file: str, tensor: str) -> None:
    folder = without(tiny_base, tmp_path / "base", file, tensor)
    base = find_base(str(folder), tmp_path / "home")
    with pytest.raises(Refused, match=rf"{base.digest}\) cannot be loaded: .*{re.escape(tensor)}"):
        load_base(base, dtype=torch.float32)
