"""The edge: a request is checked against the base and the registry once, before any work is done for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter, Options, Request
from scumble_registry import Registry, Version
from scumble_server.admission import sampling
from scumble_server.admission.inputs import Inputs
from scumble_server.admission.phases import Schedule, plan_phases
from scumble_server.admission.settle import check_size, settle, size_of
from scumble_server.base import Base
from scumble_server.denoise.schedulers import Table, table
from scumble_server.methods import METHODS, method_of, words_of
from scumble_server.methods.method import check_fields
from scumble_server.prompts.reading import Reading, read, without_tags
from scumble_server.prompts.script import Script
from scumble_server.request import original as originals
from scumble_server.request.adapter import BoundAdapter
from scumble_server.request.block_weights import block_weights
from scumble_server.request.original import Original
from scumble_server.request.settings import Settings


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may enter. `dropped` pairs an adapter with the reason why it is not bound."""

    request: Request
    base: Base
    settings: Settings
    table: Table
    adapters: tuple[BoundAdapter, ...]
    reading: Reading
    scripts: tuple[Script, ...]
    """The texts of `reading` as the base's own tokenizers read them."""
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
    """Check a request and resolve what it names. The first of `bases` is for requests that name none.

    Raises InvalidRequest, NotFound or Refused, naming what is wrong.
    """
    base = _base_of(request, bases, registry)
    request = without_tags(request)
    inputs = Inputs.of(request)
    originals.check(request.options, inpaints=base.inpaints)
    original = _original(request.options, inputs)
    resolved = [_resolve(spec, base, registry, inputs) for spec in request.adapters]
    size = size_of(request, base, original, max_pixels)
    first = _admit(request, base, inputs, resolved, size, originals.strength_of(request.options))
    return replace(
        first,
        originals=() if original is None else (original,),
        vae=_vae(request.options, base, registry),
        second=_second(first, resolved, max_pixels) if request.options.hires is not None else None,
    )


def _second(first: Admitted, resolved: Sequence[BoundAdapter], max_pixels: int) -> Admitted:
    """The same at a larger size, once there is a picture to begin with."""
    request, settings = first.request, first.settings
    hires = request.options.hires
    assert hires is not None
    size = tuple(max(8, round(side * hires.scale / 8) * 8) for side in (settings.width, settings.height))
    check_size(size[0], size[1], first.base, max_pixels, "options.hires.scale")
    asked = {"seed": settings.seed, "steps": hires.steps or settings.steps}
    return _admit(
        request.model_copy(update=asked), first.base, first.inputs, resolved, (size[0], size[1]), hires.strength
    )


def _admit(
    request: Request,
    base: Base,
    inputs: Inputs,
    resolved: Sequence[BoundAdapter],
    size: tuple[int, int],
    strength: float,
) -> Admitted:
    """Admit one pass at `size`, from wherever in its schedule a picture is changed by `strength`."""
    settings = settle(request, base, sampling.settle(request, resolved, base.defaults), size, strength)
    idle = {adapter: method_of(adapter).idle(adapter, settings.run_steps) for adapter in resolved}
    adapters = tuple(adapter for adapter, reason in idle.items() if reason is None)
    for kind, method in METHODS.items():
        method.check_together([adapter for adapter in adapters if adapter.kind == kind], base, settings)
    reading = _read(request.options, settings, base)
    scripts = reading.scripts(base.tokenizers, list(words_of(adapters).values()))
    schedule = table(
        settings.scheduler,
        _scheduler_config(adapters, base),
        settings.steps,
        start=settings.first_step,
        **settings.scheduler_options,
    )
    return Admitted(
        request,
        base,
        settings,
        schedule,
        adapters,
        reading,
        tuple(scripts),
        plan_phases(adapters, reading.rows_of_step),
        tuple((adapter.spec, reason) for adapter, reason in idle.items() if reason is not None),
        inputs,
    )


def _scheduler_config(adapters: Sequence[BoundAdapter], base: Base) -> Mapping[str, Any]:
    """The config that an adapter brings, or else the base's."""
    configs = (method_of(adapter).scheduler_config(adapter) for adapter in adapters)
    return next((config for config in configs if config is not None), base.scheduler_config)


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


def _read(options: Options, settings: Settings, base: Base) -> Reading:
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
    return reading


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


def _resolve(spec: Adapter, base: Base, registry: Registry, inputs: Inputs) -> BoundAdapter:
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
    adapter = BoundAdapter(
        spec,
        version,
        block_weights(spec.blocks, base.blocks, base.compatibility.targets),
        tuple(inputs.picture(name, "adapters.images") for name in spec.images if name not in inputs.tensors),
        {name: inputs.tensors[name] for name in spec.images if name in inputs.tensors},
        tuple(inputs.picture(name, "adapters.masks") for name in spec.masks),
    )
    method.check(adapter, base)
    return adapter
