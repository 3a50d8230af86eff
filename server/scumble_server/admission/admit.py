"""The edge: a request is checked against the base and the registry once, before any work is done for it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest, Refused
from scumble.request import SDXL_OPTIONS, Adapter, Options, Request
from scumble_registry import Registry, Version
from scumble_registry.manifest import Sampling
from scumble_server.admission import sampling
from scumble_server.base import Base
from scumble_server.denoise.schedulers import Table, first_step, table
from scumble_server.executors.limits import check_any
from scumble_server.methods import METHODS, dreambooth, textual_inversion
from scumble_server.methods.method import check_fields
from scumble_server.prompts.reading import Reading, read, without_tags
from scumble_server.request import original as originals
from scumble_server.request.adapter import Bound
from scumble_server.request.block_weights import block_weights
from scumble_server.request.original import Original, strength_of
from scumble_server.request.pictures import Picture, decode_all
from scumble_server.request.settings import Settings

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Stage:
    """What is the same in all steps of a phase: a weight for each adapter, and for each model row the text it reads."""

    weights: tuple[float, ...]
    texts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which adapters act and which texts are read when. `phase_of_step` has one entry a step."""

    stages: tuple[Stage, ...]
    phase_of_step: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request brings beside words: its pictures, decoded, and its tensors, by name."""

    pictures: Mapping[str, Picture]
    tensors: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, request: Request) -> Inputs:
        """Raises InvalidRequest for what cannot be read, for a name used twice, and for what no adapter names."""
        if both := sorted(request.images.keys() & request.tensors.keys()):
            raise InvalidRequest(f"{both[0]!r} names a picture and a tensor; rename one of them", field="images")
        named = {name for adapter in request.adapters for name in (*adapter.images, *adapter.masks)}
        named |= {name for name in (request.options.image, request.options.mask) if name is not None}
        if unused := sorted((request.images.keys() | request.tensors.keys()) - named):
            raise InvalidRequest(
                f"{unused[0]!r} was sent, but nothing names it (images or masks of an adapter, options.image, "
                "options.mask); name it or leave it out",
                field=f"{'images' if unused[0] in request.images else 'tensors'}.{unused[0]}",
            )
        for name, values in request.tensors.items():
            if values.dtype.kind != "f" or not np.isfinite(values).all():
                raise InvalidRequest(
                    f"tensors.{name}: must hold finite floating point numbers", field=f"tensors.{name}"
                )
        return cls(decode_all(request.images), request.tensors)

    def picture(self, name: str, place: str) -> Picture:
        """Raises InvalidRequest naming the adapter's field."""
        if name not in self.pictures:
            raise InvalidRequest(
                f"{place} names {name!r}, which the request does not bring; its pictures are "
                f"{sorted(self.pictures) or 'none'}, its tensors {sorted(self.tensors) or 'none'}",
                field=place,
            )
        return self.pictures[name]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may enter. `dropped` pairs an adapter with the reason why it is not bound."""

    request: Request
    base: Base
    settings: Settings
    table: Table
    adapters: tuple[Bound, ...]
    reading: Reading
    schedule: Schedule
    dropped: tuple[tuple[Adapter, str], ...]
    inputs: Inputs
    originals: tuple[Original, ...] = ()
    """What the images begin with: nothing, one for all, or one for each."""
    vae: Version | None = None
    """What decodes, where it is not the base's own."""
    second: Admitted | None = None
    """What is done with the pictures once they are drawn: the same again, larger."""


def admit(request: Request, bases: Sequence[Base], registry: Registry, max_pixels: int) -> Admitted:
    """The first of `bases` is for requests that name none.

    Raises InvalidRequest, NotFound or Refused, naming what is wrong.
    """
    base = _base_of(request, bases, registry)
    request = without_tags(request)
    inputs = Inputs.of(request)
    originals.check(request.options, inpaints=base.inpaints)
    original = _original(request.options, inputs)
    resolved = [_resolve(spec, base, registry, inputs) for spec in request.adapters]
    size = _size(request, base, original, max_pixels)
    first = _admit(request, base, inputs, resolved, size, strength_of(request.options))
    return replace(
        first,
        originals=() if original is None else (original,),
        vae=_vae(request.options, base, registry),
        second=_second(first, resolved, max_pixels) if request.options.hires is not None else None,
    )


def _second(first: Admitted, resolved: Sequence[Bound], max_pixels: int) -> Admitted:
    """The same at a larger size, once there is a picture to begin with."""
    request, settings = first.request, first.settings
    hires = request.options.hires
    assert hires is not None
    size = tuple(max(8, round(side * hires.scale / 8) * 8) for side in (settings.width, settings.height))
    _check_size(size[0], size[1], first.base, max_pixels, "options.hires.scale")
    asked = {"seed": settings.seed, "steps": hires.steps or settings.steps}
    return _admit(
        request.model_copy(update=asked), first.base, first.inputs, resolved, (size[0], size[1]), hires.strength
    )


def _admit(
    request: Request,
    base: Base,
    inputs: Inputs,
    resolved: Sequence[Bound],
    size: tuple[int, int],
    strength: float,
) -> Admitted:
    """One pass at `size`, from wherever in its schedule a picture is changed by `strength`."""
    adapters: list[Bound] = []
    dropped: list[tuple[Adapter, str]] = []
    settings = _settle(request, base, sampling.settle(request, resolved, base.defaults), size, strength)
    for bound in resolved:
        if reason := METHODS[bound.kind].idle(bound, settings.run_steps):
            dropped.append((bound.spec, reason))
        else:
            adapters.append(bound)
    for kind, method in METHODS.items():
        method.check_together([bound for bound in adapters if bound.kind == kind], base, settings)
    reading = _read(request.options, settings, base, adapters)
    return Admitted(
        request,
        base,
        settings,
        table(
            settings.scheduler,
            dreambooth.scheduler_config(adapters, base),
            settings.steps,
            start=settings.first_step,
            **settings.scheduler_options,
        ),
        tuple(adapters),
        reading,
        _schedule([bound.spec for bound in adapters], reading),
        tuple(dropped),
        inputs,
    )


def _vae(options: Options, base: Base, registry: Registry) -> Version | None:
    if options.vae is None:
        return None
    version = registry.resolve(options.vae)
    if version.manifest.kind != "vae":
        raise Refused(
            f"options.vae: {version.ref} is a {version.manifest.kind}; name a VAE that was published as one",
            ref=options.vae,
        )
    version.manifest.fits(base.version.manifest)
    return version


def _original(options: Options, inputs: Inputs) -> Original | None:
    if options.image is None:
        return None
    mask = None if options.mask is None else inputs.picture(options.mask, "options.mask")
    return Original(inputs.picture(options.image, "options.image"), mask)


def _first_step(strength: float, steps: int) -> int:
    start = first_step(steps, strength)
    if start == steps:
        raise InvalidRequest(
            f"strength {strength:g} of {steps} steps is less than one step; ask for more of either",
            field="options.strength",
        )
    return start


def _read(options: Options, settings: Settings, base: Base, adapters: Sequence[Bound]) -> Reading:
    """Raises InvalidRequest, or Refused for what this server cannot do."""
    if (options.clip_skip or 0) > base.text_layers:
        raise InvalidRequest(
            f"clip_skip leaves {options.clip_skip} layers out, the text encoder has {base.text_layers}",
            field="options.clip_skip",
        )
    reading = read(settings, options, len(base.tokenizers))
    if reading.rows > base.max_rows:
        raise Refused(
            f"AND makes {reading.rows} rows of one image, this server computes {base.max_rows} at once; "
            "join fewer prompts"
        )
    reading.scripts(base.tokenizers, textual_inversion.names(adapters))
    return reading


def _schedule(specs: Sequence[Adapter], reading: Reading) -> Schedule:
    """Steps with the same weights and texts are one phase."""
    steps = len(reading.rows_of_step)
    of_step = [
        Stage(tuple(spec.weight if spec.is_active(step, steps) else 0.0 for spec in specs), texts)
        for step, texts in enumerate(reading.rows_of_step)
    ]
    stages = dict.fromkeys(of_step)
    places = {stage: place for place, stage in enumerate(stages)}
    return Schedule(tuple(stages), tuple(places[stage] for stage in of_step))


def _base_of(request: Request, bases: Sequence[Base], registry: Registry) -> Base:
    if request.base is None:
        return bases[0]
    asked = registry.resolve(request.base)
    for base in bases:
        if asked.digest == base.version.digest:
            return base
    served = ", ".join(base.version.ref for base in bases)
    raise Refused(
        f"this server serves {served}, not {asked.ref}; name one of these, or start a server with --base {asked.ref}",
        base=served,
    )


def _given_or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _size(request: Request, base: Base, original: Original | None, max_pixels: int) -> tuple[int, int]:
    """The request's; else that of the picture that it begins with, in steps of 8; else the base's own."""
    default = base.defaults.width, base.defaults.height
    if original is not None and request.width is None and request.height is None:
        width, height = (max(8, side // 8 * 8) for side in original.picture.size)
        default = width, height
    width, height = _given_or(request.width, default[0]), _given_or(request.height, default[1])
    _check_size(width, height, base, max_pixels, "width")
    return width, height


def _check_size(width: int, height: int, base: Base, max_pixels: int, field: str) -> None:
    """Raises InvalidRequest, or Refused for what the base's engines were not built for."""
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{width}x{height} is {width * height} pixels, this server makes at most {max_pixels}; "
            f"ask for a smaller {field}",
            field=field,
        )
    scale = base.compatibility.vae_scale
    check_any(base.limits, {"width": width // scale, "height": height // scale})


def _settle(request: Request, base: Base, sampled: Sampling, size: tuple[int, int], strength: float) -> Settings:
    width, height = size
    assert sampled.scheduler is not None and sampled.steps is not None and sampled.guidance_scale is not None
    return Settings(
        prompt=request.prompt,
        negative_prompt=_given_or(request.negative_prompt, None if base.zero_negative else ""),
        scheduler=sampled.scheduler,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        steps=sampled.steps,
        strength=strength,
        first_step=_first_step(strength, sampled.steps),
        width=width,
        height=height,
        num_images=request.num_images,
        guidance_scale=sampled.guidance_scale,
        scheduler_options={
            name: value for name in sampling.SCHEDULER_OPTIONS if (value := getattr(sampled, name)) is not None
        },
        **_sdxl(request.options, base, width, height),
    )


def _sdxl(options: Options, base: Base, width: int, height: int) -> dict[str, Any]:
    """What only SDXL reads. Raises InvalidRequest for an option that the base cannot follow."""
    given = {name: value for name in SDXL_OPTIONS if (value := getattr(options, name)) is not None}
    if not base.family.sizes:
        if given:
            name = min(given)
            raise InvalidRequest(
                f"options.{name} is for SDXL; {base.version.ref} is a base of family {base.compatibility.family}: "
                "leave it out",
                field=f"options.{name}",
            )
        return {}
    original = given.get("original_size", (width, height))
    left, top = given.get("crop", (0, 0))
    target = given.get("target_size", (width, height))
    return {
        "prompt_2": options.prompt_2,
        "negative_prompt_2": options.negative_prompt_2,
        "sizes": (original[1], original[0], top, left, target[1], target[0]),
    }


def _resolve(spec: Adapter, base: Base, registry: Registry, inputs: Inputs) -> Bound:
    if spec.start > spec.end:
        raise InvalidRequest(f"{spec.ref}: start {spec.start:g} is after end {spec.end:g}", field="adapters.start")
    version = registry.resolve(spec.ref)
    version.manifest.fits(base.version.manifest)
    method = METHODS.get(version.manifest.kind)
    if method is None:
        raise Refused(
            f"{version.ref} is a {version.manifest.kind}; this server serves {', '.join(METHODS)}", ref=spec.ref
        )
    check_fields(spec, method)
    bound = Bound(
        spec,
        version,
        block_weights(spec.blocks, base.blocks, base.compatibility.targets),
        tuple(inputs.picture(name, "adapters.images") for name in spec.images if name not in inputs.tensors),
        {name: inputs.tensors[name] for name in spec.images if name in inputs.tensors},
        tuple(inputs.picture(name, "adapters.masks") for name in spec.masks),
    )
    method.check(bound, base)
    return bound
