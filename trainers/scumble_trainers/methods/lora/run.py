"""From a base and a folder of pictures to a finished adapter: everything is checked before any work is done."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from scumble.errors import InvalidRequest
from scumble_trainers.captions import read_captions
from scumble_trainers.checkpoints import Checkpoint, latest_checkpoint
from scumble_trainers.dataset import Example, data_digest, hold_out, read_folder
from scumble_trainers.latents import cached_latents
from scumble_trainers.losses import noise_schedule
from scumble_trainers.methods.lora.model import FILE, add_factors, save_factors
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.methods.lora.training import LoraRun, Material
from scumble_trainers.parent import Parent, load_parent, native_resolution
from scumble_trainers.progress import Report, silent
from scumble_trainers.provenance import provenance
from scumble_trainers.result import CARD, GRID, Result, read_result, write_result
from scumble_trainers.sampling import Samples

TRAINER = "lora"
SAMPLE_ROWS = 4
MOST_HELD_OUT = 64
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(
    parent: Parent,
    data: Path,
    out: Path,
    settings: LoraSettings,
    *,
    fresh: bool = False,
    report: Report = silent,
) -> Result:
    """Trains into `out`, continuing from its newest checkpoint, and returns what training.json says.

    A run that is finished already is returned as it is. Raises InvalidRequest for bad data, or where `out`
    holds another run (unless `fresh`, which deletes that first).
    """
    resolution = settings.resolution or native_resolution(parent)
    examples = read_folder(data, resolution=resolution)
    _check_triggers(settings, examples)
    identity: dict[str, Any] = {
        "config": settings.config(),
        "data": data_digest(examples),
        "base": parent.content,
        "resolution": resolution,
    }
    if fresh:
        _clear(out)
    finished = read_result(out)
    if finished and _same_run(finished, identity, parent):
        return finished
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        _check_resumable(checkpoint, settings, identity)
    (out / CARD).unlink(missing_ok=True)

    accelerator = _accelerator(out, settings)
    run = _prepare(accelerator, parent, examples, out, settings, identity, report)
    run.train(checkpoint)
    result = Result(
        adapter=FILE,
        license=settings.license,
        description=settings.description,
        trigger_words=settings.trigger_words,
        provenance=provenance(
            TRAINER,
            config=identity["config"],
            data_digest=identity["data"],
            pictures=len(examples),
            seed=settings.seed,
            parent=parent.digest,
            cost=run.cost,
        ).to_dict(),
        metrics={**run.metrics, "resolution": resolution},
    )
    if accelerator.is_main_process:
        save_factors(run.pipeline, out, settings.save_dtype)
        write_result(out, result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def _prepare(
    accelerator: Accelerator,
    parent: Parent,
    examples: Sequence[Example],
    out: Path,
    settings: LoraSettings,
    identity: dict[str, Any],
    report: Report,
) -> LoraRun:
    """Loads the base, encodes pictures and captions, and puts the factors in."""
    pipeline = load_parent(parent, dtype=_DTYPES[settings.mixed_precision]).to(accelerator.device)
    resolution = identity["resolution"]
    with accelerator.main_process_first():
        latents = cached_latents(
            out / "cache",
            pipeline.vae,
            examples,
            resolution=resolution,
            progress=lambda done, of: report("latents", done, of),
        )
    captions = read_captions(pipeline.tokenizer, pipeline.text_encoder, examples, cache=not settings.text_encoder)
    trained, held = hold_out(range(len(examples)), fraction=settings.validation, seed=settings.seed, most=MOST_HELD_OUT)
    material = Material(
        schedule=noise_schedule(dict(pipeline.scheduler.config)),
        latents=latents,
        captions=captions,
        trained=torch.tensor(trained),
        held=torch.tensor(held, dtype=torch.int64),
        samples=_samples(settings, [examples[index] for index in held or trained], resolution),
    )
    add_factors(pipeline, settings)
    return LoraRun(accelerator, pipeline, settings, material, out, identity, report)


def _samples(settings: LoraSettings, examples: Sequence[Example], resolution: int) -> Samples:
    prompts = settings.prompts or tuple(example.texts[0] for example in examples[:SAMPLE_ROWS])
    return Samples(prompts, settings.sample_seed, settings.sample_steps, settings.sample_guidance, resolution)


def _accelerator(out: Path, settings: LoraSettings) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with="tensorboard",
        project_dir=out / "logs",
    )
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size % parts:
        raise InvalidRequest(
            f"--batch-size {settings.batch_size} cannot be divided among {accelerator.num_processes} processes "
            f"and {settings.accumulate} accumulation parts: use a multiple of {parts}",
            field="batch_size",
        )
    accelerator.init_trackers(TRAINER)
    return accelerator


def _check_triggers(settings: LoraSettings, examples: Sequence[Example]) -> None:
    captions = [text.lower() for example in examples for text in example.texts]
    for word in settings.trigger_words:
        if not any(word.lower() in caption for caption in captions):
            raise InvalidRequest(
                f"no caption contains the trigger word {word!r}, so it would trigger nothing", field="trigger"
            )


def _check_resumable(checkpoint: Checkpoint, settings: LoraSettings, identity: dict[str, Any]) -> None:
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


def _same_run(finished: Result, identity: dict[str, Any], parent: Parent) -> bool:
    told = finished.provenance
    return (
        told["config"] == identity["config"]
        and told["data_digest"] == identity["data"]
        and told["parent"] in (parent.digest, parent.content)
    )


def _clear(out: Path) -> None:
    """Deletes what a run leaves in `out`, and nothing else that lies there. Cached latents stay: they are keyed."""
    for folder in ("checkpoints", "samples", "logs"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in (CARD, GRID, FILE):
        (out / file).unlink(missing_ok=True)
