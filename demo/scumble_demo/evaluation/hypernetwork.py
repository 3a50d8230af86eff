"""Compares a predicted LoRA with one that is trained for the same picture."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from PIL import Image

from scumble.request import Adapter
from scumble_build.graphs.predictor import Predictor
from scumble_demo.emoji.concepts import BASE_STYLES, Concept, concepts
from scumble_demo.emoji.folders import one_concept
from scumble_demo.emoji.home import data_home
from scumble_demo.emoji.packages import fetch_packages
from scumble_demo.evaluation.concept import measure_concept, other_hands, read_taught
from scumble_demo.evaluation.ip_adapter import png
from scumble_demo.evaluation.measures import similarity
from scumble_demo.evaluation.trial import ADAPTER, Metrics, Trial, rounded, show, some_concepts
from scumble_demo.scorer import Scorer
from scumble_registry.formats.hypernetwork import read_record
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_registry.results import Result
from scumble_trainers.base import TrainingBase, native_resolution
from scumble_trainers.data.dataset import read_examples
from scumble_trainers.data.sidecars import METADATA
from scumble_trainers.data.vision import PictureStates
from scumble_trainers.methods.hypernetwork.model import HypernetworkTraining
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings
from scumble_trainers.methods.lora.model import LoraTraining
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.results.serving import served
from scumble_trainers.run import train

CONCEPTS = 8
PER_CONCEPT = 4
LORA = LoraSettings(steps=200, batch_size=8, learning_rate=2e-3, rank=4, validation=0, min_snr_gamma=5)
"""Settings of the LoRAs for comparison, each trained on the picture that the network gets."""
RUNS = 5  # predictions that are timed; the median is used


@dataclass(frozen=True, slots=True)
class Subject:
    """A concept: the reference picture, its style, and other pictures to compare with."""

    concept: Concept
    picture: Image.Image
    style: str
    others: list[Image.Image]


def evaluate(base: TrainingBase, data: Path, out: Path, result: Result, scorer: Scorer) -> Metrics:
    """Measure a network, or a refined LoRA as a method that is trained on one concept."""
    if result.adapter != HypernetworkTraining.adapter:
        taught = read_taught(data, result)
        with served(base, {ADAPTER: out}) as server:
            return measure_concept(base, taught, out, scorer, server)
    unseen = [_by_the_base(concept) for concept in concepts() if concept.held_out][:CONCEPTS]
    trained = _trained_on(base, data, result)
    known = [_by_others(concept) for concept in some_concepts() if concept.name in trained][:CONCEPTS]
    subjects = unseen + known
    with tempfile.TemporaryDirectory(prefix="scumble-loras-") as temporary:
        folders = {f"lora/n{number}": Path(temporary) / str(number) for number in range(len(subjects))}
        times = [_train(base, subject, folder) for subject, folder in zip(subjects, folders.values(), strict=True)]
        runs = {name: folder / "run" for name, folder in folders.items()}
        gains = _gains(base, out, subjects, runs, scorer)
    predicting = _prediction_time(base, out / result.adapter, subjects[0].picture)
    metrics: Metrics = {"pictures": 2 * CONCEPTS * PER_CONCEPT}
    for name, part in (("unseen_concepts", gains[: len(unseen)]), ("trained_concepts", gains[len(unseen) :])):
        predicted, lora = (fmean(column) for column in zip(*part, strict=True))
        metrics |= {f"gain_{name}": predicted, f"gain_of_lora_{name}": lora, f"share_{name}": predicted / lora}
    metrics |= {"seconds": predicting, "seconds_of_lora": fmean(times)}
    return rounded(metrics) | {"share_of_time": round(predicting / fmean(times), 6)}


def _gains(
    base: TrainingBase, out: Path, subjects: Sequence[Subject], loras: dict[str, Path], scorer: Scorer
) -> list[tuple[float, float]]:
    """Return the gain in similarity to each subject by the predicted LoRA and by the trained one."""
    repeated = [subject for subject in subjects for _ in range(PER_CONCEPT)]
    trial = Trial(base, tuple(_prompt(BASE_STYLES[n % len(BASE_STYLES)].name) for n in range(len(repeated))))
    images = {str(n): png(subject.picture) for n, subject in enumerate(repeated)}
    with served(base, {ADAPTER: out, **loras}) as server:
        plain = trial.plain(server)
        predicted = trial.draw(server, [Adapter(ref=ADAPTER, images=(name,)) for name in images], images=images)
        own = trial.draw(server, [Adapter(ref=name) for name in loras for _ in range(PER_CONCEPT)])
    columns = {
        "reference": [subject.picture for subject in repeated],
        "base": plain,
        "predicted": predicted,
        "LoRA": own,
    }
    some = slice(None, None, PER_CONCEPT)
    show(out, {title: pictures[some] for title, pictures in columns.items()}, [s.concept.name for s in subjects])
    gains = []
    for number, subject in enumerate(subjects):
        part = slice(number * PER_CONCEPT, (number + 1) * PER_CONCEPT)
        before, after, lora = (similarity(scorer, drawn[part], subject.others) for drawn in (plain, predicted, own))
        gains.append((after - before, lora - before))
    return gains


def _by_the_base(concept: Concept) -> Subject:
    """Return subjects whose reference is in one of the base's styles."""
    entry = next(one_concept(fetch_packages(data_home() / "npm"), concept, "", "train"))
    return Subject(concept, Image.fromarray(entry.pixels), entry.style, other_hands(concept))


def _by_others(concept: Concept) -> Subject:
    """Return subjects whose reference is in a held-out style."""
    picture, *others = other_hands(concept)
    return Subject(concept, picture, BASE_STYLES[0].name, others)


def _trained_on(base: TrainingBase, data: Path, result: Result) -> set[str]:
    """Return the names of the concepts that the run was trained on."""
    settings = HypernetworkSettings.model_validate(result.provenance["config"])
    resolution = settings.resolution or native_resolution(base.folder)
    examples = read_examples(data, resolution=resolution, templates=settings.captions)
    return {str(examples[number].concept) for number in HypernetworkTraining.hold_out(settings, examples)[0]}


def _train(base: TrainingBase, subject: Subject, folder: Path) -> float:
    """Train a LoRA on the subject's picture into `folder/run`; returns the seconds."""
    folder.mkdir()
    subject.picture.save(folder / "picture.png")
    (folder / METADATA).write_text(json.dumps({"file_name": "picture.png", "text": _prompt(subject.style)}), "utf-8")
    result = train(LoraTraining, base, folder / METADATA, folder / "run", LORA)
    return float(result.provenance["time"])


def _prediction_time(base: TrainingBase, file: Path, picture: Image.Image) -> float:
    """Return the seconds from picture to factors, with the network loaded."""
    record = read_record(file)
    assert isinstance(record, PredictorRecord)
    predictor, seen = Predictor.of(record), PictureStates(base, None, "states", torch.device("cpu"))
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        predictor.predict(seen.look([np.asarray(picture)]))
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _prompt(style: str) -> str:
    return f"an emoji, {style} style"
