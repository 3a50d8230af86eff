"""The edge: a request is checked against the base and the registry once, before any work is done for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scumble.request import Adapter, Request
from scumble_registry import Registry, Version
from scumble_server.admission.inputs import Inputs
from scumble_server.admission.phases import Schedule, plan_phases
from scumble_server.admission.resolve import resolve_adapter, resolve_base, resolve_vae
from scumble_server.admission.settle import settle_passes
from scumble_server.admission.texts import read_texts
from scumble_server.base import Base
from scumble_server.bases import FailedBase
from scumble_server.denoise.schedulers import Table, table
from scumble_server.methods import METHODS, method_of, scheduler_config_of
from scumble_server.prompts.length import check_lengths
from scumble_server.prompts.lora_tags import without_tags
from scumble_server.prompts.reading import Reading
from scumble_server.prompts.script import Script
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.original import Original
from scumble_server.request.settings import Settings


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may enter. `dropped` pairs an adapter with the reason why it is not bound."""

    request: Request
    base: Base
    settings: Settings
    table: Table
    adapters: tuple[ResolvedAdapter, ...]
    reading: Reading
    scripts: tuple[Script, ...]
    """The texts of `reading` as the base's own tokenizers read them."""
    schedule: Schedule
    dropped: tuple[tuple[Adapter, str], ...]
    inputs: Inputs
    originals: tuple[Original, ...] = ()
    """The pictures that the images begin with: none, one for all, or one for each."""
    vae: Version | None = None
    """The VAE that decodes, if it is not the base's own."""
    second: Admitted | None = None
    """The second pass, larger, which begins with the pictures of this one."""


def admit(request: Request, bases: Sequence[Base | FailedBase], registry: Registry, max_pixels: int) -> Admitted:
    """Check a request and resolve what it names. The first of `bases` is for requests that name none.

    Raises InvalidRequest, NotFound or Refused, naming what is wrong.
    """
    check_lengths(request)
    request = without_tags(request)
    base = resolve_base(request, bases, registry)
    vae = resolve_vae(request.options, base, registry)
    inputs = Inputs.of(request, inpaints=base.inpaints)
    adapters = [resolve_adapter(spec, base, registry, inputs) for spec in request.adapters]
    passes = [
        _admit_pass(request, base, inputs, adapters, settings)
        for settings in settle_passes(request, base, adapters, inputs.original, max_pixels)
    ]
    return replace(
        passes[0],
        originals=() if inputs.original is None else (inputs.original,),
        vae=vae,
        second=passes[1] if len(passes) > 1 else None,
    )


def _admit_pass(
    request: Request, base: Base, inputs: Inputs, adapters: Sequence[ResolvedAdapter], settings: Settings
) -> Admitted:
    idle = {adapter: method_of(adapter).idle(adapter, settings.run_steps) for adapter in adapters}
    acting = tuple(adapter for adapter, reason in idle.items() if reason is None)
    for kind, method in METHODS.items():
        method.check_together([adapter for adapter in acting if adapter.kind == kind], base, settings)
    scheduler_config = scheduler_config_of(acting, base.scheduler_config)
    reading, scripts = read_texts(request.options, settings, base, acting)
    return Admitted(
        request,
        base,
        settings,
        table(
            settings.scheduler,
            scheduler_config,
            settings.steps,
            start=settings.first_step,
            **settings.scheduler_options,
        ),
        acting,
        reading,
        scripts,
        plan_phases(acting, reading.rows_of_step),
        tuple((adapter.spec, reason) for adapter, reason in idle.items() if reason is not None),
        inputs,
    )
