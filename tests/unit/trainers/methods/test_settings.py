"""What single methods can be told, and what they refuse before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file

from scumble.errors import Incompatible, InvalidRequest
from scumble_registry import Registry
from scumble_registry.results import publish_result
from scumble_trainers.base import TrainingBase, find_base
from scumble_trainers.run import train
from support.every_method import ENTRIES, make_settings, run_method
from support.tiny_ip import make_image_encoder


def refused(method: str, base: TrainingBase, data: Path, out: Path, **changes: Any) -> str:
    with pytest.raises((InvalidRequest, Incompatible)) as caught:
        train(ENTRIES[method].load(), base, data, out, make_settings(method, **changes))
    assert not list(out.rglob("*.safetensors"))
    return str(caught.value)


def give_control_pictures(data: Path, count: int) -> None:
    """To the first `count` lines: each a copy of the next line's picture."""
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    for index, line in enumerate(lines[:count]):
        line["conditioning_image"] = f"control-{index}.png"
        shutil.copyfile(data / lines[(index + 1) % len(lines)]["file_name"], data / line["conditioning_image"])
    (data / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")


def test_an_ip_adapter_with_a_tower_of_its_own_is_published_with_it(
    base_folder: Path, things: Path, tmp_path: Path
) -> None:
    """The base has none here."""
    tower = make_image_encoder(tmp_path / "tower", seed=5, preparation=True)
    home, out = tmp_path / "home", tmp_path / "out"
    with Registry.open(home, create=True) as registry:
        registry.publish(base_folder, "tiny/base")
    run_method("ip_adapter", find_base("tiny/base", home), things, out, image_encoder=tower)
    assert (out / "ip_adapter/image_encoder/config.json").is_file()
    with Registry.open(home) as registry:
        version = publish_result(registry, out, "tiny/look", base="tiny/base")
        folder = registry.materialise(version)
    kept = load_file(folder / "image_encoder/model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in load_file(tower / "model.safetensors").items())


def test_without_a_tower_there_is_no_ip_adapter_and_no_hypernetwork(
    base_folder: Path, things: Path, tmp_path: Path
) -> None:
    base = find_base(str(base_folder), tmp_path)
    assert "--image-encoder FOLDER" in refused("ip_adapter", base, things, tmp_path / "a")
    assert "is no image encoder" in refused("hypernetwork", base, things, tmp_path / "b")


def test_ready_made_control_pictures_are_looked_at(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    give_control_pictures(things, 6)
    method: Any = run_method("controlnet", base, things, tmp_path / "out", preprocessor="none").method
    assert len(method.maps) == 6
    own = np.unique(method.maps[0].numpy().reshape(3, -1), axis=1)
    assert own.shape[1] > 2  # a coloured picture and no edges


def test_control_pictures_must_be_there_or_be_made(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    give_control_pictures(things, 4)
    assert "4.png" in refused("controlnet", base, things, tmp_path / "a", preprocessor="none")
    assert "there are canny" in refused("controlnet", base, things, tmp_path / "b", preprocessor="sketchy")


def test_a_controlnet_goes_on_from_another(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    run_method("controlnet", base, things, tmp_path / "first")
    run_method(
        "controlnet", base, things, tmp_path / "next", init=tmp_path / "first/controlnet", steps=1, learning_rate=1e-9
    )
    first, after = (
        ControlNetModel.from_pretrained(tmp_path / name / "controlnet").state_dict() for name in ("first", "next")
    )
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in first.items())
    assert any(value.abs().max() > 1e-4 for name, value in after.items() if "controlnet_down_blocks" in name)


def test_the_hints_widths_must_be_as_many_as_the_latents_need(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    assert "need 2 of them" in refused("controlnet", base, things, tmp_path / "a", hint_channels=(8, 8, 8))
    assert "no ControlNet folder" in refused("controlnet", base, things, tmp_path / "b", init=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "two words"}, "is not a single word"),
        ({"token": "<y>"}, "no caption with <y>"),
        ({"initial_words": "red", "vectors": 1}, "more than --vectors"),
    ],
)
def test_words_that_cannot_be_learnt(
    base: TrainingBase, things: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refused("textual_inversion", base, things, tmp_path / "out", **changes)


def test_a_word_begins_as_other_words(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    """Every letter is a token of the tiny tokenizer."""
    run = run_method(
        "textual_inversion", base, things, tmp_path / "out", initial_words="ab", steps=1, learning_rate=1e-9
    )
    method: Any = run.method
    ids = method.pipeline.tokenizer("ab", add_special_tokens=False).input_ids
    table = method.pipeline.text_encoder.get_input_embeddings().table.weight
    spread = 6 * 0.01 * float(table.std())
    assert (method.vectors[0] - table[ids]).abs().max() < spread
    assert load_file(tmp_path / "out/learned_embeds.safetensors")["<x>"].shape == (2, 16)


def test_class_pictures_are_square(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    message = refused("dreambooth", base, things, tmp_path / "out", class_prompts=("a disc",), bucket=True)
    assert "--bucket cannot be used with --class-prompt" in message
