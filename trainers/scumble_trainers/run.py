"""Trains an adapter from a base and pictures. Everything is checked before any work is done."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from scumble.errors import InvalidRequest
from scumble_registry.results import GRID, RESULT, Result, read_result, write_result
from scumble_trainers.base import TrainingBase, load_base, schedule_config, side_multiple
from scumble_trainers.data.buckets import Size, choose_sizes
from scumble_trainers.data.captions import read_captions
from scumble_trainers.data.checking import TrainingData, check_data
from scumble_trainers.data.dataset import Example
from scumble_trainers.data.latents import cached_latents
from scumble_trainers.losses import noise_schedule
from scumble_trainers.method import Material, TrainingMethod
from scumble_trainers.progress import ProgressReport, silent
from scumble_trainers.results.card import write_card
from scumble_trainers.results.provenance import provenance
from scumble_trainers.results.sampling import Samples
from scumble_trainers.results.writing import explain_write_errors
from scumble_trainers.settings import TrainSettings
from scumble_trainers.steps.allocator import keep_freed_memory
from scumble_trainers.steps.checkpoints import Checkpoint, latest_checkpoint
from scumble_trainers.steps.loop import Run

SAMPLE_ROWS = 4


def train(
    kind: type[TrainingMethod[Any]],
    base: TrainingBase,
    data: Path | TrainingData,
    out: Path,
    settings: TrainSettings,
    *,
    fresh: bool = False,
    report: ProgressReport = silent,
) -> Result:
    """Train into `out`, from its newest checkpoint if there is one, and return the content of training.json.

    `data` are a folder or a file of lines, or were checked for this base and these settings already. A finished run's
    result is returned as it is. Raises InvalidRequest for bad data, or if `out` holds another run (unless `fresh`,
    which deletes that first), Unavailable if `out` cannot be written.
    """
    kind = kind.of(settings)
    noise_schedule(schedule_config(base))  # raises for an unknown prediction type
    checked = data if isinstance(data, TrainingData) else check_data(base.folder, data, settings)
    examples = list(checked.examples)
    kind.check(settings, base, examples)
    identity: dict[str, Any] = {
        "config": settings.config(),
        "data": checked.digest,
        "base": base.content,
        "resolution": checked.resolution,
    }
    if fresh:
        _clear(out)
    finished = read_result(out)
    if finished and _same_run(finished, identity, base):
        return finished
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        _check_resumable(checkpoint, settings, identity)
    keep_freed_memory()
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).unlink(missing_ok=True)
        accelerator = _accelerator(out, kind.name, settings)
        run = _prepare(accelerator, kind, base, examples, out, settings, identity, report)
        run.train(checkpoint)
        return _finish(run, len(examples))


def _finish(run: Run, pictures: int) -> Result:
    """Save the adapter and, last, training.json."""
    accelerator, method, settings, out = run.accelerator, run.method, run.settings, run.out
    result = Result(
        adapter=method.adapter,
        license=settings.license,
        description=settings.description,
        trigger_words=method.trigger_words,
        provenance=provenance(
            method.name,
            config=run.identity["config"],
            data_digest=run.identity["data"],
            pictures=pictures,
            seed=settings.seed,
            parent=method.base.digest,
            cost=run.cost,
        ).to_dict(),
        metrics={**run.metrics, "resolution": run.identity["resolution"]},
    )
    if accelerator.is_main_process:
        run.save_adapter(out)
        write_card(out, result, base=method.base.ref)
        write_result(out, result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def _prepare(
    accelerator: Accelerator,
    kind: type[TrainingMethod[Any]],
    base: TrainingBase,
    examples: list[Example],
    out: Path,
    settings: TrainSettings,
    identity: dict[str, Any],
    report: ProgressReport,
) -> Run:
    """Load the base, add the trained parameters, encode pictures and captions."""
    with accelerator.main_process_first():
        further = kind.further_examples(base, settings, examples, out, report)
    pipeline = load_base(base, dtype=kind.weights_dtype(settings)).to(accelerator.device)
    torch.manual_seed(settings.seed)
    method = kind(pipeline, settings, base)
    material = _material(accelerator, method, examples, further, out, identity["resolution"], report)
    method.begin(material, accelerator.device, report)
    method.lay_out()
    return Run(accelerator, method, out, identity, report)


def _material(
    accelerator: Accelerator,
    method: TrainingMethod[Any],
    examples: list[Example],
    further: list[Example],
    out: Path,
    resolution: int,
    report: ProgressReport,
) -> Material:
    settings, pipeline, everything = method.settings, method.pipeline, [*examples, *further]
    sizes = choose_sizes(everything, resolution, side_multiple(method.base.folder), bucket=settings.bucket)
    with accelerator.main_process_first():
        latents = cached_latents(
            out / "cache",
            pipeline.vae,
            everything,
            sizes,
            progress=lambda done, of: report("latents", done, of),
        )
    captions = read_captions(method.text, everything, cache=not method.trains_text, device=accelerator.device)
    trained, held = method.hold_out(settings, examples)
    return Material(
        examples=everything,
        schedule=noise_schedule(dict(pipeline.scheduler.config)),
        latents=latents,
        captions=captions,
        framing=_framing(everything, sizes),
        trained=torch.tensor(trained),
        held=torch.tensor(held, dtype=torch.int64),
        further=torch.arange(len(examples), len(everything)),
        samples=_samples(settings, [examples[index] for index in held or trained], resolution),
    )


def _framing(examples: Sequence[Example], sizes: Sequence[Size]) -> torch.Tensor:
    """Return SDXL's six time ids of every picture, which `load_picture` resizes and then crops at the centre."""
    rows = []
    for (width, height), example in zip(sizes, examples, strict=True):
        scale = max(width / example.size[0], height / example.size[1])
        left, top = (
            max(0, round(scale * own - used) // 2) for own, used in zip(example.size, (width, height), strict=True)
        )
        rows.append((example.size[1], example.size[0], top, left, height, width))
    return torch.tensor(rows, dtype=torch.float32)


def _samples(settings: TrainSettings, examples: Sequence[Example], resolution: int) -> Samples:
    prompts = settings.prompts or tuple(example.texts[0] for example in examples[:SAMPLE_ROWS])
    return Samples(prompts, settings.sample_seed, settings.sample_steps, settings.sample_guidance, resolution)


def _accelerator(out: Path, name: str, settings: TrainSettings) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with="tensorboard",
        project_dir=out / "logs",
    )
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size % parts:
        raise InvalidRequest(
            f"--batch-size {settings.batch_size} cannot be split over {accelerator.num_processes} processes "
            f"and {settings.accumulate} accumulation parts: use a multiple of {parts}",
            field="batch_size",
        )
    accelerator.init_trackers(name)
    return accelerator


def _check_resumable(checkpoint: Checkpoint, settings: TrainSettings, identity: dict[str, Any]) -> None:
    earlier = checkpoint.state["identity"]
    differences = settings.differences(earlier["config"])
    differences += [name for name in ("data", "base", "resolution") if earlier[name] != identity[name]]
    if checkpoint.step > settings.steps:
        differences.append(f"it is at step {checkpoint.step} already")
    if differences:
        raise InvalidRequest(
            f"{checkpoint.folder.parent.parent} holds another run ({'; '.join(differences)}): "
            "choose another --out, or start over with --fresh",
            field="out",
        )


def _same_run(finished: Result, identity: dict[str, Any], base: TrainingBase) -> bool:
    provenance = finished.provenance
    return (
        provenance["config"] == identity["config"]
        and provenance["data_digest"] == identity["data"]
        and provenance["parent"] in (base.digest, base.content)
    )


def _clear(out: Path) -> None:
    """Delete a run's files in `out` and nothing else. Cached latents stay, as they have keys."""
    finished = read_result(out)
    for folder in ("checkpoints", "samples", "logs"):
        shutil.rmtree(out / folder, ignore_errors=True)
    if finished:
        adapter = out / finished.adapter
        shutil.rmtree(adapter, ignore_errors=True) if adapter.is_dir() else adapter.unlink(missing_ok=True)
    for file in (RESULT, GRID):
        (out / file).unlink(missing_ok=True)
