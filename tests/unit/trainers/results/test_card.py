"""README.md beside the adapter, read by the model hub's own parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from scumble_registry import Registry
from scumble_trainers.base import find_base
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.run import train


def trained(base: str, home: Path, data: Path, **told: Any) -> ModelCard:
    small = {"steps": 1, "batch_size": 2, "rank": 2, "sample_steps": 1}
    train(LoraTraining, find_base(base, home), data, home / "out", LoraSettings.model_validate(small | told))
    return ModelCard.load(home / "out" / "README.md")


def test_a_card_says_all_that_the_manifest_will(base_folder: Path, make_data: Any, tmp_path: Path) -> None:
    with Registry.open(tmp_path, create=True) as registry:
        registry.publish(base_folder, "tiny/base")
    words = {"trigger_words": ("flat style", "disc"), "license": "CC-BY-SA-4.0", "description": 'Flat: "discs"'}
    card = trained("tiny/base", tmp_path, make_data(4), **words)
    told = json.loads((tmp_path / "out" / "training.json").read_text())

    assert card.data.base_model == "tiny/base@1"
    assert (card.data.library_name, card.data.license) == ("diffusers", "CC-BY-SA-4.0")
    assert card.data.to_dict()["instance_prompt"] == "flat style"
    assert "lora" in card.data.tags
    assert card.text.strip().startswith('# Flat: "discs"')
    assert "Trigger words: flat style, disc" in card.text
    assert told["provenance"]["data_digest"] in card.text
    assert "(sample_grid.png)" in card.text
    metrics, config = (json.loads(block.partition("```")[0]) for block in card.text.split("```json")[1:])
    assert metrics == told["metrics"]
    assert config == told["provenance"]["config"]


def test_a_card_of_little_says_so(base_folder: Path, make_data: Any, tmp_path: Path) -> None:
    card = trained(str(base_folder), tmp_path, make_data(4))
    assert card.data.license == "unknown"
    assert card.data.base_model.startswith("sha256:")
    assert "instance_prompt" not in card.data.to_dict()
    assert "Trigger words: none" in card.text
    assert "License: not given" in card.text
