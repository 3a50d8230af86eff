"""The request, as its sender writes it and as the server checks it: one type on both sides of the wire."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from scumble.errors import InvalidRequest

SchedulerName = Literal["ddim", "euler", "dpmpp_2m"]
MAX_SIZE = 2048
MAX_STEPS = 1000
MAX_IMAGES = 16

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Adapter(_Strict):
    """One adapter of a request. Its kind comes from the registry, not from here."""

    ref: str
    weight: Finite = 1.0
    """Strength; negative is allowed, 0 drops the adapter (the receipt says so)."""
    text_weight: Finite | None = None
    """Strength on the text encoder; None means the same as `weight`."""
    blocks: dict[str, Finite] | tuple[Finite, ...] | None = None
    """Strength by block, on top of `weight`: the webui's list, or by name (`IN01`, `up_blocks.1`, `BASE`)."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The adapter acts in step i of n unless i/n < start or (i+1)/n > end. The text encoder has no steps."""

    token: Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")] | None = None
    """The word in the prompts that stands for a textual inversion; None means the one that it was published with."""

    def is_active(self, step: int, steps: int) -> bool:
        return not (step / steps < self.start or (step + 1) / steps > self.end)


class Request(_Strict):
    """One generation. None means the base's own default; the receipt says what was used."""

    prompt: str
    negative_prompt: str | None = None
    """Absent and empty differ only where diffusers makes them differ (SDXL)."""
    base: str | None = None
    scheduler: SchedulerName | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    width: Annotated[int, Field(ge=8, le=MAX_SIZE, multiple_of=8)] | None = None
    height: Annotated[int, Field(ge=8, le=MAX_SIZE, multiple_of=8)] | None = None
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    adapters: tuple[Adapter, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _known_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if options:
            raise ValueError(f"unknown options {sorted(options)}; this server knows none yet")
        return options

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Request:
        """Check `data` once, at the edge. Raises InvalidRequest that names every bad field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error) from error


def parse_adapters(data: Any) -> tuple[Adapter, ...]:
    """A list of plain dicts to adapters. Raises InvalidRequest naming the place."""
    try:
        return tuple(Adapter.model_validate(item) for item in data)
    except ValidationError as error:
        raise _explain(error, prefix="adapters.") from error


def parse_adapter(text: str) -> Adapter:
    """`REF[:WEIGHT]` of the command line. A digest's own colon is not a weight.

    >>> parse_adapter("styles/ink@2:0.8")
    Adapter(ref='styles/ink@2', weight=0.8, text_weight=None)
    """
    ref, colon, weight = text.rpartition(":")
    if not colon or ref.endswith("@sha256"):
        return Adapter(ref=text)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(
            f"weight {weight!r} of adapter {ref!r} is not a finite number; write REF:WEIGHT, e.g. {ref}:0.8",
            field="adapters.weight",
        )
    return Adapter(ref=ref, weight=value)


def _explain(error: ValidationError, prefix: str = "") -> InvalidRequest:
    problems = [(prefix + ".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
    text = "; ".join(f"{field}: {message}" for field, message in problems)
    return InvalidRequest(text, field=problems[0][0])
