"""The request, as its sender writes it and as the server checks it: one type on both sides of the wire."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SkipValidation, ValidationError, field_validator
from typing_extensions import TypeAliasType

from scumble.errors import InvalidRequest

SchedulerName = Literal[
    "ddim",
    "euler",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "dpmpp_sde",
    "dpmpp_sde_karras",
    "unipc",
    "lcm",
    "tcd",
]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
MAX_SIZE = 2048
MAX_STEPS = 1000
MAX_IMAGES = 16
MAX_ADAPTERS = 32
MAX_INPUTS = 64
"""Pictures, and tensors, that one request brings."""

Format = Literal["png", "webp", "jpeg"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pixel = Annotated[int, Field(ge=0, le=16384)]
PixelSize = tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


InputName = Annotated[str, Field(min_length=1, max_length=200)]
"""Of a picture or a tensor of the request."""
LayerScale = TypeAliasType("LayerScale", "float | tuple[LayerScale, ...] | dict[str, LayerScale]")


class Adapter(_Strict):
    """One adapter of a request. Its kind comes from the registry, not from here.

    A field that means nothing to that kind is refused by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

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
    text: Annotated[str, Field(max_length=10_000)] | None = None
    """What a hypernetwork that predicts a LoRA from a text reads; None means the request's prompt."""
    images: Annotated[
        tuple[InputName, ...], Field(max_length=16, validation_alias=AliasChoices("images", "image"))
    ] = ()
    """What it looks at: names of the request's pictures (or, where it takes embeddings, of its tensors)."""
    masks: Annotated[tuple[InputName, ...], Field(max_length=16, validation_alias=AliasChoices("masks", "mask"))] = ()
    """Where each of `images` acts, white on black."""
    scale: LayerScale | None = None
    """An IP-Adapter's strength by block and layer, on top of `weight`, as diffusers writes it; of a union ControlNet,
    one number for each of `images`.
    """
    mode: Literal["balanced", "prompt", "control", "guess"] | None = None
    """Of a ControlNet: whether prompt or control goes first where they disagree; None means balanced."""
    control_type: tuple[InputName, ...] = ()
    """What each of `images` shows, for a ControlNet that knows several kinds of control."""
    preprocess: InputName | dict[str, Any] | None = None
    """How a picture becomes a control map: `canny`, or `{"name": "canny", "low": 100}`. None: it is a map."""

    @field_validator("images", "masks", "control_type", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def is_active(self, step: int, steps: int) -> bool:
        return not (step / steps < self.start or (step + 1) / steps > self.end)


class Hires(_Strict):
    """A second pass: the finished picture, enlarged, is begun with again (img2img), with the same seed."""

    scale: Annotated[float, Field(gt=1, le=4)] = 2.0
    """Of each side, rounded to steps of 8."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How much of it changes."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """None means as in the first pass."""


class Options(_Strict):
    """What a request may ask for beside the picture. An unknown option is refused, never ignored."""

    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Who goes first when the server is full; waiting weighs too, so that low priorities are not starved."""
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] | None = None
    """From the moment the server has the request; if it is not done then, it fails with DeadlineExceeded."""
    preview_every: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Send a small, rough picture every so many steps (streaming only)."""
    grammar: Literal["plain", "webui", "compel"] = "plain"
    """How prompts are read: as text, or in the language of the webui or of compel."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] | None = None
    """How many of the text encoder's last layers are left out; None means none of them, as in diffusers."""
    emphasis: Literal["original", "no_norm"] = "original"
    """What follows when the webui's grammar has weighted words: the mean of each chunk is restored, or not."""
    lora_tags: bool = False
    """Whether `<lora:ns/name:0.8>` in a prompt of the webui's grammar adds that adapter."""
    return_maps: bool = False
    """Also return the control maps that `preprocess` made."""
    image: InputName | None = None
    """Begin with this one of the request's pictures (img2img), resized to the request's size."""
    mask: InputName | None = None
    """Draw only what is white in this one of the request's pictures, and keep the rest of `image` (inpainting)."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much of `image` changes: the share of the steps that is run. None means 0.8, or 1 with a mask."""
    hires: Hires | None = None
    """Draw at the request's size first, where bases compose best, and then larger."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Against washed-out pictures at high guidance (Lin et al., 2305.08891, 3.4)."""
    format: Format | None = None
    """Answer with files of this format, which carry the receipt, instead of pixels."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of WebP and JPEG; None means 90."""
    vae: str | None = None
    """Reference of a VAE to encode and decode with, instead of the base's own."""
    vae_tiling: bool = False
    """Decode piece by piece: less memory for large pictures, faint seams at worst."""
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    """For SDXL's second text encoder; None means the same as for the first."""
    original_size: PixelSize | None = None
    crop: tuple[Pixel, Pixel] | None = None
    target_size: PixelSize | None = None
    """What SDXL is told of the picture, in pixels: width and height of the original, left and top of where it was cut,
    width and height aimed at. None means the picture's own size, uncut.
    """
    timestep_spacing: TimestepSpacing | None = None
    """How the scheduler spreads its timesteps (Lin et al., 2305.08891, table 2); None means as the base says."""
    rescale_betas: bool | None = None
    """Let the last timestep hold no signal at all (same paper, algorithm 1); None means as the base says."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much noise ddim and tcd add again in each step (tcd's gamma); None means 0."""


SDXL_OPTIONS = ("prompt_2", "negative_prompt_2", "original_size", "crop", "target_size")


class Request(_Strict):
    """One generation. None means the base's own default; the receipt says what was used.

    Two requests are equal if they would be drawn the same: pictures by their bytes, tensors by their values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

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
    adapters: Annotated[tuple[Adapter, ...], Field(max_length=MAX_ADAPTERS)] = ()
    options: Options = Options()
    images: Annotated[dict[InputName, bytes], Field(max_length=MAX_INPUTS)] = Field(default_factory=dict)
    """Encoded pictures (PNG, JPEG, WebP) by the names that adapters call them."""
    tensors: Annotated[dict[InputName, SkipValidation[NDArray[Any]]], Field(max_length=MAX_INPUTS)] = Field(
        default_factory=dict
    )
    """Embeddings that the caller has made, by the names that adapters call them."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Request):
            return NotImplemented
        same = self.tensors.keys() == other.tensors.keys() and all(
            np.array_equal(value, other.tensors[name]) for name, value in self.tensors.items()
        )
        fields = set(type(self).model_fields) - {"tensors"}
        return same and all(getattr(self, name) == getattr(other, name) for name in fields)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Request:
        """Check `data` once, at the edge. Raises InvalidRequest that names every bad field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error) from error


def parse_adapter(text: str) -> Adapter:
    """`REF[:WEIGHT]` of the command line. A digest's own colon is not a weight.

    >>> adapter = parse_adapter("styles/ink@2:0.8")
    >>> adapter.ref, adapter.weight
    ('styles/ink@2', 0.8)
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


def _explain(error: ValidationError) -> InvalidRequest:
    problems = [(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
    text = "; ".join(f"{field}: {message}" for field, message in problems)
    return InvalidRequest(text, field=problems[0][0])
