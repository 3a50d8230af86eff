"""Everything that a LoRA run can be told, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.errors import InvalidRequest

Precision = Literal["no", "fp16", "bf16"]
LearningRateSchedule = Literal["constant", "cosine"]
StoredType = Literal["fp16", "bf16", "fp32"]

UNRELATED = frozenset({"steps", "checkpoint_every", "keep_checkpoints", "save_dtype", "trigger_words", "license"}) | {
    "description",
    "accumulate",
    "gradient_checkpointing",
}
"""What may differ when a run is resumed: it does not change what the earlier steps did."""


class LoraSettings(BaseModel):
    """One run. Together with the base and the data it decides the adapter, bit by bit on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Pictures per step, over all processes and accumulation parts."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that a process's share of a batch is run in: less memory, the same result."""
    learning_rate: float = Field(default=1e-4, gt=0, le=10)
    text_learning_rate: float | None = Field(default=None, gt=0, le=10)
    """Of the text encoder's factors; by default the UNet's."""
    schedule: LearningRateSchedule = "cosine"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)

    rank: int = Field(default=8, ge=1, le=256)
    alpha: float | None = Field(default=None, gt=0)
    """The update is multiplied by alpha / rank; by default alpha = rank."""
    feed_forward: bool = False
    text_encoder: bool = False

    seed: int = Field(default=0, ge=0, lt=2**63)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    min_snr_gamma: float | None = Field(default=None, gt=0)
    resolution: int | None = Field(default=None, ge=8, le=2048, multiple_of=8)
    """Pixels a side; by default what the base was trained at."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share of the pictures held out, at most 64 of them."""

    checkpoint_every: int = Field(default=250, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    save_dtype: StoredType = "fp16"

    prompts: tuple[str, ...] = ()
    """Of the sample grid; by default captions of held-out pictures."""
    sample_seed: int = Field(default=0, ge=0, lt=2**63)
    sample_steps: int = Field(default=20, ge=1, le=1000)
    sample_guidance: float = Field(default=5.0, ge=0, le=100)

    trigger_words: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""

    @property
    def scale_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    def config(self) -> dict[str, Any]:
        """Plain JSON, for provenance and checkpoints."""
        return self.model_dump(mode="json")

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """What keeps this run from continuing one with the settings `earlier`, as "name: then → now"."""
        now = self.config()
        return [
            f"{name}: {earlier.get(name)} → {value}"
            for name, value in now.items()
            if name not in UNRELATED and earlier.get(name) != value
        ]


def parse_settings(values: dict[str, Any]) -> LoraSettings:
    """The settings, or InvalidRequest that names the option and its range."""
    try:
        return LoraSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        option = "--" + field.replace("_", "-")
        raise InvalidRequest(f"{option} {first.get('input')}: {first['msg']}", field=field) from error


def default_out(home: Path, name: str) -> Path:
    """Where a run that is published as `ns/name` keeps its checkpoints."""
    return home / "train" / "lora" / name
