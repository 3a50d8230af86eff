"""Trainers that draw with our own server: DreamBooth's class pictures, and the effect of what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble_demo.evaluation import lora as effect
from scumble_demo.evaluation import trial
from scumble_demo.evaluation.run import measure
from scumble_registry.results import read_result
from scumble_trainers.base import find_base
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.run import train

SCUMBLE = str(Path(sys.executable).with_name("scumble"))
DEMO = Path(__file__).parents[2] / "demo/base"


def write_pictures(folder: Path, side: int, text: str) -> Path:
    folder.mkdir()
    lines = []
    for index, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (side, side), colour).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def test_the_class_is_drawn_by_the_base_through_our_server(tiny_base: Path, tmp_path: Path) -> None:
    data, out, home = write_pictures(tmp_path / "data", 64, "a sks thing"), tmp_path / "out", tmp_path / "home"
    environment = os.environ | {"SCUMBLE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    publish = [SCUMBLE, "registry", "publish", str(tiny_base), "--name", "tiny/base"]
    subprocess.run(publish, env=environment, check=True, capture_output=True)
    command = [SCUMBLE, "train", "dreambooth", "--base", "tiny/base", "--data", str(data), "--out", str(out)]
    command += ["--steps", "2", "--batch-size", "2", "--learning-rate", "1e-3", "--validation", "0"]
    command += ["--class-prompt", "a thing", "--class-prompt", "another thing", "--class-pictures", "3"]
    command += ["--sample-steps", "1", "--trigger", "sks", "--publish", "things/sks", "--json"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["ref"] == "things/sks@1"
    lines = [json.loads(line) for line in (out / "class/metadata.jsonl").read_text("utf-8").splitlines()]
    assert [line["text"] for line in lines] == ["a thing", "another thing", "a thing"]
    pictures = [np.asarray(Image.open(out / "class" / line["file_name"])) for line in lines]
    assert not np.array_equal(pictures[0], pictures[2])  # another seed
    shown = [SCUMBLE, "registry", "show", "things/sks@1", "--json"]
    manifest = json.loads(subprocess.run(shown, env=environment, check=True, capture_output=True).stdout)
    assert json.dumps(manifest).count('"dreambooth"') >= 1


def test_the_effect_is_drawn_by_the_server_and_kept_with_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "STEPS", 2)
    monkeypatch.setattr(effect, "some_concepts", lambda: trial.some_concepts(3))
    data, out = write_pictures(tmp_path / "data", 128, "a red apple, ink style"), tmp_path / "out"
    settings = LoraSettings(
        steps=1, batch_size=1, rank=1, validation=0, sample_steps=1, trigger_words=("ink style",), prompts=("an owl",)
    )
    parent = find_base(str(DEMO), tmp_path / "home")
    measured = measure("lora", parent, data, out, train(LoraTraining, parent, data, out, settings))

    told = measured.metrics["effect"]
    assert set(told) == {
        "pictures",
        "style_first",
        "style_first_without",
        "concept_first",
        "concept_first_of_base",
    }
    assert told["pictures"] == 3
    assert read_result(out) == measured
    assert "style_first" in (out / "README.md").read_text("utf-8")
    assert (out / "effect_grid.png").is_file()
