"""The edge: a request is checked against the base and the registry once, before any work is done for it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter, Request
from scumble_registry import Registry
from scumble_server.base import Base
from scumble_server.block_weights import block_weights
from scumble_server.bound import Bound
from scumble_server.methods import METHODS, dreambooth, textual_inversion
from scumble_server.methods.method import check_fields
from scumble_server.pictures import Picture, decode_all
from scumble_server.reading import Reading, read, without_tags
from scumble_server.schedulers import Table, table
from scumble_server.settings import Settings

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
        if unused := sorted((request.images.keys() | request.tensors.keys()) - named):
            raise InvalidRequest(
                f"{unused[0]!r} was sent, but no adapter names it in its images or masks; name it or leave it out",
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
    settings: Settings
    table: Table
    adapters: tuple[Bound, ...]
    reading: Reading
    schedule: Schedule
    dropped: tuple[tuple[Adapter, str], ...]
    inputs: Inputs


def admit(request: Request, base: Base, registry: Registry, max_pixels: int) -> Admitted:
    """Raises InvalidRequest, NotFound or Refused, naming what is wrong."""
    _check_base(request, base, registry)
    request = without_tags(request)
    settings = _settle(request, base, max_pixels)
    adapters: list[Bound] = []
    dropped: list[tuple[Adapter, str]] = []
    inputs = Inputs.of(request)
    for spec in request.adapters:
        bound = _resolve(spec, base, registry, inputs)
        if reason := METHODS[bound.kind].idle(bound, settings.steps):
            dropped.append((spec, reason))
        else:
            adapters.append(bound)
    for kind, method in METHODS.items():
        method.check_together([bound for bound in adapters if bound.kind == kind], base)
    reading = _read(request, settings, base, adapters)
    return Admitted(
        request,
        settings,
        table(settings.scheduler, dreambooth.scheduler_config(adapters, base), settings.steps),
        tuple(adapters),
        reading,
        _schedule([bound.spec for bound in adapters], reading),
        tuple(dropped),
        inputs,
    )


def _read(request: Request, settings: Settings, base: Base, adapters: Sequence[Bound]) -> Reading:
    """Raises InvalidRequest, or Refused for what this server or this base cannot do."""
    skip, layers = request.options.clip_skip or 0, base.executor.text_layers
    if skip > layers:
        raise InvalidRequest(
            f"clip_skip leaves {skip} layers out, the text encoder has {layers}", field="options.clip_skip"
        )
    reading = read(request, settings.steps, guided=settings.guided)
    if reading.rows > base.executor.max_rows:
        raise Refused(
            f"AND makes {reading.rows} rows of one image, this server computes {base.executor.max_rows} at once; "
            "join fewer prompts"
        )
    names = textual_inversion.names(adapters)
    for text in reading.texts:
        reading.tokens(text, base.tokenizer, names)
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


def _check_base(request: Request, base: Base, registry: Registry) -> None:
    if request.base is None:
        return
    asked = registry.resolve(request.base)
    if asked.digest != base.version.digest:
        raise Refused(
            f"this server runs base {base.version.ref}, not {asked.ref}; ask it without a base, "
            f"or start a server with --base {asked.ref}",
            base=base.version.ref,
        )


def _given_or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _settle(request: Request, base: Base, max_pixels: int) -> Settings:
    defaults = base.defaults
    width, height = _given_or(request.width, defaults.width), _given_or(request.height, defaults.height)
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{width}x{height} is {width * height} pixels, this server makes at most {max_pixels}; "
            "ask for a smaller width or height",
            field="width",
        )
    return Settings(
        prompt=request.prompt,
        negative_prompt=_given_or(request.negative_prompt, ""),
        scheduler=_given_or(request.scheduler, defaults.scheduler),
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        steps=_given_or(request.steps, defaults.steps),
        width=width,
        height=height,
        num_images=request.num_images,
        guidance_scale=_given_or(request.guidance_scale, defaults.guidance_scale),
    )


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
