"""A base that is broken or not whole is refused before it is trained on, with what is wrong and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scumble.errors import Refused
from scumble_trainers.base import find_base, load_base, locate_base
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


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def cut(at: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:at])


def many_tensors(file: Path) -> None:
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def to_pickle(file: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, file.with_suffix(".bin"))
    file.unlink()


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "git-lfs pointer": (UNET, lambda f: f.write_bytes(LFS), f"{UNET} is not a sound .* run `git lfs pull`"),
    "web page": (TEXT, lambda f: f.write_text("<!DOCTYPE html>"), f"{TEXT} is not a sound .* it is a web page"),
    "JSON": (TEXT, lambda f: f.write_text('{"error":"unauthorized"}'), "it is JSON"),
    "empty": (UNET, lambda f: f.write_bytes(b""), "it is empty.*download it again"),
    "cut in the header": (TEXT, cut(500), f"{TEXT} .*cut off inside its header"),
    "cut in the data": (TEXT, cut(20_000), f"{TEXT} .*cut off: its tensors take"),
    "missing": (UNET, Path.unlink, "unet has no weights in safetensors; get the whole folder again"),
    "a pickle": (UNET, to_pickle, "unet has no weights in safetensors"),
    "a header of 100,000 tensors": (UNET, many_tensors, "100000 tensors, at most 20000"),
    "no config": ("text_encoder/config.json", Path.unlink, "lacks text_encoder/config.json"),
    "no scheduler": ("scheduler/scheduler_config.json", Path.unlink, "lacks scheduler/scheduler_config.json"),
    "broken JSON": ("model_index.json", lambda f: f.write_text("{"), "model_index.json in .* is not JSON"),
    "a mark before JSON": (
        "unet/config.json",
        lambda f: f.write_bytes(b"\xef\xbb\xbf" + f.read_bytes()),
        "unet/config.json in .* is not JSON: Unexpected UTF-8 BOM",
    ),
    "a list": ("vae/config.json", lambda f: f.write_text("[]"), "vae/config.json in .* must hold a JSON object"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named_before_any_weights_are_read(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    file, break_it, says = BROKEN[fault]
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    break_it(folder / file)
    with pytest.raises(Refused, match=says):
        locate_base(str(folder), tmp_path / "home")


def test_what_training_does_not_read_may_be_broken(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "safety_checker").mkdir()
    for name in ("safety_checker/model.safetensors", "whole.safetensors"):
        (folder / name).write_bytes(LFS)
    assert locate_base(str(folder), tmp_path / "home").folder == folder
