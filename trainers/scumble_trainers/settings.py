"""Settings of every training run; each method adds its own. A field is also an option and a key of --config."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.errors import InvalidRequest, NotFound
from scumble_trainers.data.dataset import Example, held_out_count

Precision = Literal["no", "fp16", "bf16"]
LearningRateSchedule = Literal["constant", "cosine"]
StoredType = Literal["fp16", "bf16", "fp32"]

MOST_HELD_OUT = 64

TRAIN, MODEL, DATA, SAVE, SHOW = "Training", "Model", "Data", "Result", "Samples"

UNRELATED = frozenset(
    {
        "steps",
        "checkpoint_every",
        "keep_checkpoints",
        "save_dtype",
        "trigger_words",
        "license",
        "description",
        "accumulate",
        "gradient_checkpointing",
        "layout",
    }
)
"""Settings that may differ when a run is resumed, as they do not change earlier steps."""

Settings = TypeVar("Settings", bound="TrainSettings")


def option(default: Any = ..., *, panel: str, help: str, name: str | None = None, **limits: Any) -> Any:  # noqa: A002
    """Make a field that the command line's help has under `panel`, as --name (default: the field's name)."""
    extra: dict[str, Any] = {"panel": panel, "option": name}
    return Field(default, description=help, json_schema_extra=extra, **limits)


class TrainSettings(BaseModel):
    """Settings of one run. With base and data they determine the adapter, bit by bit on the same machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = option(panel=TRAIN, help="Number of updates.", ge=1, le=1_000_000)
    batch_size: int = option(8, panel=TRAIN, help="Pictures per update, over all processes and parts.", ge=1, le=4096)
    accumulate: int = option(
        1, panel=TRAIN, help="Parts into which a process splits its share (gradient accumulation): less memory.", ge=1
    )
    learning_rate: float = option(1e-4, panel=TRAIN, help="Of AdamW.", gt=0, le=10)
    schedule: LearningRateSchedule = option("cosine", panel=TRAIN, help="Learning rate's.")
    warmup: int = option(0, panel=TRAIN, help="Updates of linear warm-up.", ge=0)
    weight_decay: float = option(1e-2, panel=TRAIN, help="Of AdamW.", ge=0)
    max_grad_norm: float = option(1.0, panel=TRAIN, help="Gradient clipping.", gt=0)
    min_snr_gamma: float | None = option(None, panel=TRAIN, help="Min-SNR weighting; 5 is usual.", gt=0)
    ema: float | None = option(
        None,
        panel=TRAIN,
        help="Decay of a moving average of the trained weights, which is then saved; 0.999 is usual.",
        gt=0,
        lt=1,
    )
    caption_dropout: float = option(0.1, panel=TRAIN, help="Share of rows trained without a caption.", ge=0, le=1)
    seed: int = option(0, panel=TRAIN, help="Seed of everything random.", ge=0, lt=2**63)
    mixed_precision: Precision = option("no", panel=TRAIN, help="Compute type.")
    gradient_checkpointing: bool = option(
        default=False, panel=TRAIN, help="Compute activations again in the backward pass: less memory, more time."
    )
    checkpoint_every: int = option(250, panel=TRAIN, help="Updates.", ge=1)
    keep_checkpoints: int = option(2, panel=TRAIN, help="Newest kept.", ge=1)

    resolution: int | None = option(
        None,
        panel=DATA,
        help="Side in pixels; default: what the base was trained at.",
        ge=8,
        le=2048,
        multiple_of=8,
    )
    bucket: bool = option(
        default=False,
        panel=DATA,
        help="Train at the pictures' aspect ratios, in sizes of one area, instead of cropping.",
    )
    captions: tuple[str, ...] = option(
        (),
        panel=DATA,
        name="caption",
        help="Caption in place of the data's; repeat, one is chosen at random. {text} is the picture's own caption, "
        "{name} what its file is called (red_apple-02.png: red apple), {style} its style.",
    )
    validation: float = option(
        0.1, panel=DATA, help=f"Share of the pictures to hold out, at most {MOST_HELD_OUT} pictures.", ge=0, lt=1
    )

    prompts: tuple[str, ...] = option(
        (), panel=SHOW, name="prompt", help="Prompt of the sample grid; repeat. Default: held-out captions."
    )
    sample_seed: int = option(0, panel=SHOW, help="Prompt i uses seed + i.", ge=0, lt=2**63)
    sample_steps: int = option(20, panel=SHOW, help="Denoising steps.", ge=1, le=1000)
    sample_guidance: float = option(5.0, panel=SHOW, help="Guidance scale.", ge=0, le=100)

    save_dtype: StoredType = option("fp16", panel=SAVE, help="Floating point type of the file.")
    trigger_words: tuple[str, ...] = option((), panel=SAVE, name="trigger", help="Trigger word; repeat.")
    license: str | None = option(None, panel=SAVE, help="SPDX.")
    description: str = option("", panel=SAVE, help="Description, one line.")

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check that the data have what these settings need. Raises InvalidRequest. A method adds its own checks."""
        captions = [text.lower() for example in examples for text in example.texts]
        for word in self.trigger_words:
            if not any(word.lower() in caption for caption in captions):
                raise InvalidRequest(
                    f"no caption contains the trigger word {word!r}, so it would have no effect", field="trigger"
                )

    def warnings(self, examples: Sequence[Example]) -> list[str]:
        """Return what can be trained on, but hardly as it was meant."""
        trained = len(examples) - held_out_count(len(examples), fraction=self.validation, most=MOST_HELD_OUT)
        if trained > 1:
            return []
        held = "" if len(examples) == 1 else " (the other is held out; with --validation 0 both are trained on)"
        what = "the adapter will repeat that picture, background and all. Give it 5 to 20 pictures"
        return [f"it is trained on one picture alone{held}: {what}"]

    def config(self) -> dict[str, Any]:
        """Return the settings as plain JSON, for provenance and checkpoints."""
        return self.model_dump(mode="json")

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Return the differences that keep this run from continuing one with the settings `earlier`, as "name: then →
        now".

        An option missing from `earlier` counts as having today's default.
        """
        then = {**type(self).model_construct().config(), **earlier}
        return [
            f"{name}: {then[name]} → {value}"
            for name, value in self.config().items()
            if name not in UNRELATED and then[name] != value
        ]


def option_name(settings: type[TrainSettings], field: str) -> str:
    """Return a field's option, such as `--trigger` for `trigger_words`."""
    extra = settings.model_fields[field].json_schema_extra if field in settings.model_fields else None
    name = extra.get("option") if isinstance(extra, dict) else None
    return "--" + str(name or field).replace("_", "-")


def parse_settings(settings: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Validate settings. Raises InvalidRequest naming the option and its range."""
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        given = "" if first["type"] == "missing" else f" {first.get('input')}"
        name = option_name(settings, field) if field else "options"
        raise InvalidRequest(f"{name}{given}: {first['msg']}", field=field) from error


def read_config(file: Path, settings: type[TrainSettings]) -> dict[str, Any]:
    """Read options from a TOML file, named as on the command line (`batch-size`) or as fields (`batch_size`)."""
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no configuration file {file}", field="config") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{file} cannot be read as TOML: {error}", field="config") from error
    fields = {option_name(settings, field).removeprefix("--"): field for field in settings.model_fields}
    known = {name.replace("-", "_"): field for name, field in fields.items()} | {f: f for f in settings.model_fields}
    odd = sorted(key for key in content if key.replace("-", "_") not in known)
    if odd:
        options = ", ".join(sorted(fields))
        raise InvalidRequest(
            f"{file} has {json.dumps(odd[0])}, which is no option; there are {options}", field="config"
        )
    return {known[key.replace("-", "_")]: value for key, value in content.items()}
