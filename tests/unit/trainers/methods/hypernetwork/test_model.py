"""References and rows of the hypernetwork's training, its refinement, and what neither takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scumble.errors import Incompatible, InvalidRequest
from scumble_build.graphs.predictor import Predictor
from scumble_registry import Registry
from scumble_registry.formats.hypernetwork import read_record
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_registry.results import publish_result
from scumble_trainers.base import TrainingBase, find_base
from scumble_trainers.data.dataset import read_examples
from scumble_trainers.method import Condition
from scumble_trainers.methods.hypernetwork.layers import expand_rows
from scumble_trainers.methods.hypernetwork.model import HypernetworkTraining
from scumble_trainers.methods.lora.files import FILE
from scumble_trainers.run import train
from scumble_trainers.steps.loop import Run
from support.every_method import ENTRIES, make_settings, run_method
from support.tiny_ip import make_image_encoder

METHOD = "hypernetwork"
SAVED = "hypernetwork.safetensors"


@pytest.fixture
def network(base: TrainingBase, things: Path, tmp_path: Path) -> Path:
    """A trained one's file."""
    run_method(METHOD, base, things, tmp_path / "network", learning_rate=3e-2)
    return tmp_path / "network" / SAVED


def predicted_updates(file: Path, states: torch.Tensor) -> dict[str, torch.Tensor]:
    record = read_record(file)
    assert isinstance(record, PredictorRecord)
    factors = Predictor.of(record).predict(states)
    return {name: alpha / len(down) * up @ down for name, (down, up, alpha) in factors.items()}


def test_every_row_has_the_lora_that_the_predictor_gives_it_alone(
    base: TrainingBase, things: Path, tmp_path: Path
) -> None:
    method: Any = run_method(METHOD, base, things, tmp_path / "out").method
    coefficients = method.predictor(method.seen.of(torch.tensor([0, 3, 5])))
    rows = expand_rows(method.predictor, coefficients)
    for row in range(3):
        for target, (down, up, _) in method.predictor.expand(coefficients[row]).items():
            torch.testing.assert_close(rows[target][0][row], down)
            torch.testing.assert_close(rows[target][1][row], up)


def test_rows_of_one_batch_do_not_see_each_others_references(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    method: Any = run_method(METHOD, base, things, tmp_path / "out", learning_rate=3e-2).method
    pictures = torch.tensor([0, 4])
    captions = method.material.captions
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 600])
    with torch.no_grad():
        text = captions.embed(method.text, captions.of(pictures), method.device, chunks=1)
        together = method.predict(Condition(pictures, text, None), noisy, times)
        for row in range(2):
            own = captions.embed(method.text, captions.of(pictures[row : row + 1]), method.device, chunks=1)
            alone = method.predict(Condition(pictures[row : row + 1], own, None), noisy[row][None], times[row][None])
            torch.testing.assert_close(together[row][None], alone, atol=1e-5, rtol=1e-4)


def test_references_are_of_the_same_concept(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    method: Any = run_method(METHOD, base, things, tmp_path / "out", same_reference=0.5).method
    pictures = torch.arange(6)
    assert method.choose(pictures, torch.full((6,), 0.49)).tolist() == [0, 1, 2, 3, 4, 5]
    assert method.choose(pictures, torch.full((6,), 0.51)).tolist() == [1, 0, 3, 2, 5, 4]


def test_whole_concepts_are_held_out(things: Path) -> None:
    examples = read_examples(things, resolution=16)
    settings: Any = make_settings(METHOD, validation=0.3)
    trained, held = HypernetworkTraining.hold_out(settings, examples)
    assert len(held) == 2
    assert examples[held[0]].concept == examples[held[1]].concept
    assert sorted(trained + held) == list(range(6))


def test_captions_may_leave_the_concept_to_the_picture(
    base: TrainingBase, things: Path, tmp_path: Path, prepare: Callable[..., Run]
) -> None:
    settings = make_settings(METHOD, captions=("a thing, {style} style",))
    run = prepare(HypernetworkTraining, base, things, tmp_path / "out", settings)
    said = [example.texts for example in run.method.material.examples]
    assert said == [("a thing, flat style",), ("a thing, round style",)] * 3


def test_a_refinement_begins_as_what_was_predicted(
    base: TrainingBase, things: Path, tmp_path: Path, network: Path, prepare: Callable[..., Run]
) -> None:
    """With a higher rank than the prediction's, whose further ranks add nothing yet."""
    settings: Any = make_settings(METHOD, refine=3, source=str(network), rank=4, reference=things / "2.png")
    run = prepare(HypernetworkTraining, base, things, tmp_path / "begun", settings)
    run.method.save(tmp_path, "fp32")
    method: Any = run_method(METHOD, base, things, tmp_path / "again").method
    updates = predicted_updates(network, method.seen.of(torch.tensor([2])))
    saved = load_file(tmp_path / FILE)
    assert len(saved) == 2 * len(updates)
    for target, update in updates.items():
        down, up = saved[f"{target}.lora_A.weight"], saved[f"{target}.lora_B.weight"]
        assert len(down) == 4
        torch.testing.assert_close(up @ down, update, atol=1e-6, rtol=1e-4)


def test_a_refinement_is_published_as_a_lora(base: TrainingBase, things: Path, tmp_path: Path, network: Path) -> None:
    """From a version in the registry; the base stays column 0 of the grid."""
    with Registry.open(tmp_path / "home", create=True) as registry:
        registry.publish(base.folder, "tiny/base")
        registry.publish(network, name="tiny/network", base="tiny/base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCUMBLE_HOME", str(tmp_path / "home"))
        run = run_method(METHOD, base, things, tmp_path / "out", steps=3, refine=3, source="tiny/network@1")
    bare = run_method("lora", base, things, tmp_path / "bare")
    columns = [(place.out / "samples/step-000000.png").read_bytes() for place in (run, bare)]
    assert columns[0] == columns[1]
    with Registry.open(tmp_path / "home") as registry:
        version = publish_result(registry, tmp_path / "out", "tiny/refined", base="tiny/base")
    assert version.manifest.kind == "lora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10, "heads": 4}, "is not divisible"),
        ({"source": "x.safetensors"}, "--refine N"),
        ({"refine": 2}, "--from FILE"),
        ({"captions": ("a {style} thing",)}, "has no .style."),
    ],
)
def test_settings_that_make_no_sense(
    base: TrainingBase, things: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    lines = [json.loads(line) for line in (things / "metadata.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        line.pop("style")
    (things / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    with pytest.raises(InvalidRequest, match=message):
        train(ENTRIES[METHOD].load(), base, things, tmp_path / "out", make_settings(METHOD, **changes))
    assert not (tmp_path / "out").exists()


def test_one_concept_is_too_few(base: TrainingBase, things: Path, tmp_path: Path) -> None:
    text = (things / "metadata.jsonl").read_text("utf-8").replace('"red"', '"blue"').replace('"green"', '"blue"')
    (things / "metadata.jsonl").write_text(text, "utf-8")
    with pytest.raises(InvalidRequest, match="needs many concepts"):
        train(ENTRIES[METHOD].load(), base, things, tmp_path / "out", make_settings(METHOD))


def test_a_network_of_another_tower_and_a_reference_that_is_none(
    base: TrainingBase, things: Path, tmp_path: Path, network: Path, base_folder: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    make_image_encoder(other / "image_encoder", seed=3)
    settings = make_settings(METHOD, refine=2, source=str(network))
    with pytest.raises(Incompatible, match="another image encoder"):
        train(ENTRIES[METHOD].load(), find_base(str(other), tmp_path), things, tmp_path / "out", settings)
    settings = make_settings(METHOD, refine=2, source=str(network), reference=things / "metadata.jsonl")
    with pytest.raises(InvalidRequest, match="cannot be read as a picture"):
        train(ENTRIES[METHOD].load(), base, things, tmp_path / "out", settings)
    settings = make_settings(METHOD, refine=2, source=str(things / "0.png"))
    with pytest.raises(InvalidRequest, match="is not a hypernetwork"):
        train(ENTRIES[METHOD].load(), base, things, tmp_path / "out", settings)
