"""`scumble train lora`: options in, a LoRA in the registry out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scumble.errors import InvalidRequest

if TYPE_CHECKING:
    from scumble_trainers.methods.lora.settings import LoraSettings


class Schedule(StrEnum):
    constant = "constant"
    cosine = "cosine"


class MixedPrecision(StrEnum):
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


class SaveType(StrEnum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


def _option(*names: str, panel: str, help: str) -> Any:  # noqa: A002, typer's word
    return typer.Option(*names, rich_help_panel=panel, help=help)


TRAIN, MODEL, DATA, SAVE, SHOW = "Training", "Factors", "Data", "Result", "Samples"


def train_lora(
    base: Annotated[
        str, _option("--base", panel=DATA, help="Base: a diffusers folder, or a reference: ns/name, ns/name@7.")
    ],
    data: Annotated[Path, _option("--data", panel=DATA, help="Folder with pictures and metadata.jsonl.")],
    steps: Annotated[int, _option("--steps", panel=TRAIN, help="Updates in all.")],
    publish: Annotated[str | None, _option("--publish", panel=SAVE, help="Publish as ns/name.")] = None,
    alias: Annotated[str | None, _option("--alias", panel=SAVE, help="Point this alias at it.")] = None,
    staged: Annotated[bool, _option("--staged", panel=SAVE, help="Publish without approving.")] = False,
    out: Annotated[Path | None, _option("--out", panel=SAVE, help="Checkpoints, samples, logs and the result.")] = None,
    fresh: Annotated[bool, _option("--fresh", panel=SAVE, help="Delete an earlier run in --out first.")] = False,
    trigger: Annotated[list[str] | None, _option("--trigger", panel=SAVE, help="Trigger word; repeat.")] = None,
    license: Annotated[str | None, _option("--license", panel=SAVE, help="SPDX.")] = None,  # noqa: A002
    description: Annotated[str, _option("--description", panel=SAVE, help="One line for people.")] = "",
    save_dtype: Annotated[SaveType, _option("--save-dtype", panel=SAVE, help="Of the file.")] = SaveType.fp16,
    rank: Annotated[int, _option("--rank", panel=MODEL, help="Rank of every factor.")] = 8,
    alpha: Annotated[float | None, _option("--alpha", panel=MODEL, help="By default the rank.")] = None,
    feed_forward: Annotated[
        bool, _option("--feed-forward", panel=MODEL, help="Feed-forward layers as well as attention.")
    ] = False,
    text_encoder: Annotated[bool, _option("--text-encoder", panel=MODEL, help="The text encoder as well.")] = False,
    batch_size: Annotated[int, _option("--batch-size", panel=TRAIN, help="Pictures per update, in all.")] = 8,
    learning_rate: Annotated[float, _option("--learning-rate", panel=TRAIN, help="Of AdamW.")] = 1e-4,
    text_learning_rate: Annotated[
        float | None, _option("--text-learning-rate", panel=TRAIN, help="By default the same.")
    ] = None,
    schedule: Annotated[Schedule, _option("--schedule", panel=TRAIN, help="Learning rate's.")] = Schedule.cosine,
    warmup: Annotated[int, _option("--warmup", panel=TRAIN, help="Updates of linear warm-up.")] = 0,
    weight_decay: Annotated[float, _option("--weight-decay", panel=TRAIN, help="Of AdamW.")] = 1e-2,
    max_grad_norm: Annotated[float, _option("--max-grad-norm", panel=TRAIN, help="Gradient clipping.")] = 1.0,
    min_snr_gamma: Annotated[
        float | None, _option("--min-snr-gamma", panel=TRAIN, help="Min-SNR weighting; 5 is usual.")
    ] = None,
    caption_dropout: Annotated[
        float, _option("--caption-dropout", panel=TRAIN, help="Share trained without caption.")
    ] = 0.1,
    seed: Annotated[int, _option("--seed", panel=TRAIN, help="Of everything random.")] = 0,
    mixed_precision: Annotated[
        MixedPrecision, _option("--mixed-precision", panel=TRAIN, help="Compute type.")
    ] = MixedPrecision.no,
    accumulate: Annotated[int, _option("--accumulate", panel=TRAIN, help="Run a batch in this many parts.")] = 1,
    gradient_checkpointing: Annotated[
        bool, _option("--gradient-checkpointing", panel=TRAIN, help="Less memory, more time.")
    ] = False,
    checkpoint_every: Annotated[int, _option("--checkpoint-every", panel=TRAIN, help="Updates.")] = 250,
    keep_checkpoints: Annotated[int, _option("--keep-checkpoints", panel=TRAIN, help="Newest kept.")] = 2,
    resolution: Annotated[int | None, _option("--resolution", panel=DATA, help="By default the base's.")] = None,
    validation: Annotated[float, _option("--validation", panel=DATA, help="Share of pictures held out.")] = 0.1,
    prompt: Annotated[
        list[str] | None,
        _option("--prompt", panel=SHOW, help="Of the grid; repeat. Default: held-out captions."),
    ] = None,
    sample_seed: Annotated[int, _option("--sample-seed", panel=SHOW, help="Prompt i uses seed + i.")] = 0,
    sample_steps: Annotated[int, _option("--sample-steps", panel=SHOW, help="Denoising steps.")] = 20,
    sample_guidance: Annotated[float, _option("--sample-guidance", panel=SHOW, help="Guidance scale.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, show no progress.")] = False,
) -> None:
    """Train a LoRA on a folder of captioned pictures, and publish it.

    Continues from its newest checkpoint when the same command runs again in the same --out.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of picture libraries that nothing here uses
    from scumble_trainers.methods.lora.settings import parse_settings

    settings = parse_settings(
        {
            "steps": steps,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "learning_rate": learning_rate,
            "text_learning_rate": text_learning_rate,
            "schedule": schedule.value,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "rank": rank,
            "alpha": alpha,
            "feed_forward": feed_forward,
            "text_encoder": text_encoder,
            "seed": seed,
            "caption_dropout": caption_dropout,
            "min_snr_gamma": min_snr_gamma,
            "resolution": resolution,
            "validation": validation,
            "checkpoint_every": checkpoint_every,
            "keep_checkpoints": keep_checkpoints,
            "mixed_precision": mixed_precision.value,
            "gradient_checkpointing": gradient_checkpointing,
            "save_dtype": save_dtype.value,
            "prompts": tuple(prompt or ()),
            "sample_seed": sample_seed,
            "sample_steps": sample_steps,
            "sample_guidance": sample_guidance,
            "trigger_words": tuple(trigger or ()),
            "license": license,
            "description": description,
        }
    )
    if publish is None and out is None:
        raise InvalidRequest("say where the result goes: --publish ns/name, --out FOLDER or both", field="out")
    if publish is None and (alias or staged):
        raise InvalidRequest("--alias and --staged need --publish ns/name", field="publish")
    told = _train_and_publish(
        base, data, out, settings, publish, alias=alias, staged=staged, fresh=fresh, quiet=as_json
    )
    if told is not None:
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else _in_words(told))


def _train_and_publish(
    base: str,
    data: Path,
    out: Path | None,
    settings: LoraSettings,
    publish: str | None,
    *,
    alias: str | None,
    staged: bool,
    fresh: bool,
    quiet: bool,
) -> dict[str, Any] | None:
    """Checks the names, trains, publishes; returns what `--json` prints, or None in all processes but the first."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    from scumble_registry import Registry, default_home
    from scumble_registry.references import parse_alias, parse_name
    from scumble_trainers.methods.lora.run import train
    from scumble_trainers.methods.lora.settings import default_out
    from scumble_trainers.parent import find_parent
    from scumble_trainers.progress import shown
    from scumble_trainers.result import publish_result

    home = default_home()
    if publish is not None:
        parse_name(publish)
    if alias is not None:
        parse_alias(alias)
    parent = find_parent(base, home)
    where = out or default_out(home, str(publish))
    with shown(wanted=not quiet) as report:
        result = train(parent, data, where, settings, fresh=fresh, report=report)
    told: dict[str, Any] = {"out": str(where), **asdict(result), "adapter": str(where / result.adapter)}
    if not PartialState().is_main_process:
        return None
    if publish is None:
        return told
    with Registry.open(home, create=True) as registry:
        version = publish_result(registry, where, publish, base=parent.ref, alias=alias, staged=staged)
    return {**told, "ref": version.ref, "digest": version.digest}


def _in_words(told: dict[str, Any]) -> str:
    """The result as a person reads it."""
    before, after = told["metrics"]["before"], told["metrics"]["after"]
    lines = [f"{name.replace('_', ' ')}: {before[name]:.4f} → {after[name]:.4f}" for name in after]
    cost = told["provenance"]
    lines.append(f"{cost['time']:.0f} s, {cost['peak_memory'] / 2**20:.0f} MiB, on {cost['device']}")
    lines.append(f"published as {told['ref']} ({told['digest']})" if "ref" in told else f"saved as {told['adapter']}")
    lines.append(f"sample grid: {told['out']}/sample_grid.png")
    return "\n".join(lines)
