"""The request: one type for the client and the server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SkipValidation, ValidationError, field_validator
from typing_extensions import TypeAliasType

from scumble.errors import InvalidRequest
from scumble.suggestions import unknown

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
"""The most input images, and the most input tensors, of one request."""

Format = Literal["png", "webp", "jpeg"]
MAX_WEIGHT = 100.0
"""The largest weight, positive or negative, of an adapter, a block, a layer or words: twenty times what people use, and
as much as half precision bears.
"""
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
Pixel = Annotated[int, Field(ge=0, le=16384)]
PixelSize = tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


InputName = Annotated[str, Field(min_length=1, max_length=200)]
"""The name of an input image or tensor of the request."""
LayerScale = TypeAliasType("LayerScale", "float | tuple[LayerScale, ...] | dict[str, LayerScale]")


class Adapter(_Strict):
    """One adapter of a request. Its kind comes from the registry.

    A field that does not apply to the kind is refused by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    ref: str
    weight: Weight = 1.0
    """How strongly the adapter acts; negative is allowed, 0 drops the adapter (the receipt lists it)."""
    text_weight: Weight | None = None
    """The weight on the text encoder; None means the same as `weight`."""
    blocks: dict[str, Weight] | tuple[Weight, ...] | None = None
    """Weight by block, multiplied by `weight`: the webui's list, or by name (`IN01`, `up_blocks.1`, `BASE`)."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The adapter acts in step i of n unless i/n < start or (i+1)/n > end. The text encoder has no steps."""

    token: Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")] | None = None
    """The word in the prompts that invokes a textual inversion; None means the one that it was published with."""
    text: Annotated[str, Field(max_length=10_000)] | None = None
    """The text from which a hypernetwork predicts a LoRA; None means the request's prompt."""
    images: Annotated[
        tuple[InputName, ...], Field(max_length=16, validation_alias=AliasChoices("images", "image"))
    ] = ()
    """The images that it reads: names of the request's input images (of its tensors, if it reads embeddings)."""
    masks: Annotated[tuple[InputName, ...], Field(max_length=16, validation_alias=AliasChoices("masks", "mask"))] = ()
    """The area in which each of `images` acts, white on black: names of input images."""
    scale: LayerScale | None = None
    """An IP-Adapter's scale by block and layer, multiplied by `weight`, in diffusers' form; for a union ControlNet, one
    number for each of `images`."""
    mode: Literal["balanced", "prompt", "control", "guess"] | None = None
    """For a ControlNet: whether prompt or control has precedence where they disagree; None means balanced."""
    control_type: tuple[InputName, ...] = ()
    """The control type of each of `images`, for a union ControlNet."""
    preprocess: InputName | dict[str, Any] | None = None
    """How an image becomes a control map: `canny`, or `{"name": "canny", "low": 100}`. None: it is a map."""

    @field_validator("images", "masks", "control_type", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("scale")
    @classmethod
    def _bounded(cls, value: LayerScale | None) -> LayerScale | None:
        if any(not abs(number) <= MAX_WEIGHT for number in _numbers(value)):
            raise ValueError(f"each number must be between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
        return value

    def is_active(self, step: int, steps: int) -> bool:
        return not (step / steps < self.start or (step + 1) / steps > self.end)


class Hires(_Strict):
    """A second pass: img2img on the enlarged image of the first pass, with the same seed."""

    scale: Annotated[float, Field(gt=1, le=4)] = 2.0
    """The factor for width and height, which are rounded to multiples of 8."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The img2img strength of the second pass."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Steps of the second pass; None means as in the first."""


class Options(_Strict):
    """Options of a request. An unknown option is refused, never ignored."""

    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Precedence when the server is full; waiting raises it, so that low priorities are not starved."""
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] | None = None
    """Time from the request's arrival at the server after which it fails with DeadlineExceeded."""
    preview_every: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Send a small, rough image every so many steps (streaming only)."""
    grammar: Literal["plain", "webui", "compel"] = "plain"
    """The syntax of prompts: plain text, or that of the webui or of compel."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] | None = None
    """Number of the text encoder's last layers that are left out; None means none, as in diffusers."""
    emphasis: Literal["original", "no_norm"] = "original"
    """Whether the mean of each chunk is restored after the webui's grammar has weighted words (`original`) or not."""
    lora_tags: bool = False
    """Whether `<lora:ns/name:0.8>` in a prompt of the webui's grammar adds that adapter."""
    return_maps: bool = False
    """Also return the control maps that `preprocess` made."""
    image: InputName | None = None
    """Name of the input image for img2img; it is resized to the request's size."""
    mask: InputName | None = None
    """Name of the input image for inpainting: white areas change, the rest of `image` stays."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share of the steps that img2img runs. None means 0.8, or 1 with a mask."""
    hires: Hires | None = None
    """A second pass at a larger size; the request's size is that of the first pass, at which bases compose best."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rescaling of the guidance, against overexposed images at high guidance (Lin et al., 2305.08891, 3.4)."""
    format: Format | None = None
    """Return files of this format, with the receipt inside, instead of pixels."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Quality of WebP and JPEG; None means 90."""
    vae: str | None = None
    """Reference of a VAE to use instead of the base's."""
    vae_tiling: bool = False
    """Decode in tiles: less memory for large images, with faint seams at worst."""
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    """For SDXL's second text encoder; None means the same as for the first."""
    original_size: PixelSize | None = None
    crop: tuple[Pixel, Pixel] | None = None
    target_size: PixelSize | None = None
    """SDXL's size conditioning in pixels: width and height of the original, left and top of the crop, width and height
    of the target. None means the image's own size, uncropped."""
    timestep_spacing: TimestepSpacing | None = None
    """The scheduler's spacing of timesteps (Lin et al., 2305.08891, table 2); None means the base's."""
    rescale_betas: bool | None = None
    """Rescale betas to zero terminal SNR (same paper, algorithm 1); None means as in the base."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """The noise that ddim and tcd add in each step (tcd's gamma); None means 0."""


SDXL_OPTIONS = ("prompt_2", "negative_prompt_2", "original_size", "crop", "target_size")


class Request(_Strict):
    """One generation. None means the base's default; the receipt has the values that were used.

    Requests are equal if all fields are: images by their bytes, tensors by their values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    prompt: str
    negative_prompt: str | None = None
    """None and empty differ only for SDXL, as in diffusers."""
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
    """Encoded input images (PNG, JPEG, WebP) by the names that adapters and options use."""
    tensors: Annotated[dict[InputName, SkipValidation[NDArray[Any]]], Field(max_length=MAX_INPUTS)] = Field(
        default_factory=dict
    )
    """Precomputed embeddings by the names that adapters use."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _named_or_described(cls, value: Any) -> Any:
        """An adapter may be given as text, as on the command line."""
        return [parse_adapter(each) if isinstance(each, str) else each for each in value] if _is_list(value) else value

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
        """Validate `data`. Raises InvalidRequest that names every bad field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error) from error


def _numbers(scale: LayerScale | None) -> Iterator[float]:
    """Yield all numbers of a scale."""
    if isinstance(scale, tuple | dict):
        for value in scale.values() if isinstance(scale, dict) else scale:
            yield from _numbers(value)
    elif scale is not None:
        yield scale


def parse_adapter(text: str) -> Adapter:
    """Parse `REF[:WEIGHT]` of the command line. A digest's own colon does not begin a weight. Raises InvalidRequest.

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
    if not abs(value) <= MAX_WEIGHT:
        raise InvalidRequest(
            f"weight {weight!r} of adapter {ref!r} is not a finite number between {-MAX_WEIGHT:g} and {MAX_WEIGHT:g}; "
            f"write REF:WEIGHT, e.g. {ref}:0.8",
            field="adapters.weight",
        )
    return Adapter(ref=ref, weight=value)


def check_field_names(names: Iterable[str]) -> None:
    """Raises InvalidRequest for the first name that is no field of a request, with the right one."""
    fields = [*Request.model_fields, *(f"options.{name}" for name in Options.model_fields)]
    for name in names:
        if name not in Request.model_fields:
            raise InvalidRequest(f"{name}: {unknown(name, fields)}", field=name)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _explain(error: ValidationError) -> InvalidRequest:
    problems = [(".".join(str(part) for part in item["loc"]), _problem(item)) for item in error.errors()]
    text = "; ".join(f"{field}: {message}" for field, message in problems)
    return InvalidRequest(text, field=problems[0][0])


def _problem(item: Any) -> str:
    """Say what is wrong, and for an unknown field what its right name may be."""
    if item["type"] != "extra_forbidden":
        return str(item["msg"])
    *where, name = (str(part) for part in item["loc"])
    if not where:
        return unknown(name, [*Request.model_fields, *(f"options.{name}" for name in Options.model_fields)])
    owner = {"adapters": Adapter, "options": Hires if where[-1] == "hires" else Options}[where[0]]
    return unknown(name, owner.model_fields)
