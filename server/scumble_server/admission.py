"""The edge: a request is checked against the base and the registry once, before any work is done for it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from scumble.errors import InvalidRequest, Refused
from scumble.request import Adapter, Request
from scumble_build.layout import Layout, rank_bucket
from scumble_registry import Registry, Version
from scumble_registry.compatibility import LoraCompatibility
from scumble_server.base import Base
from scumble_server.schedulers import Table, table

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Bound:
    """One adapter of a request, resolved to a version. Every later step goes by its digest."""

    spec: Adapter
    version: Version

    @property
    def text_weight(self) -> float:
        return self.spec.weight if self.spec.text_weight is None else self.spec.text_weight


@dataclass(frozen=True, slots=True)
class Settings:
    """A request whose every field has a value."""

    prompt: str
    negative_prompt: str
    scheduler: str
    seed: int
    steps: int
    width: int
    height: int
    num_images: int
    guidance_scale: float

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def seeds(self) -> list[int]:
        """Image i of n uses seed + i."""
        return [self.seed + i for i in range(self.num_images)]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may enter. `dropped` pairs an adapter with the reason why it is not bound."""

    request: Request
    settings: Settings
    table: Table
    adapters: tuple[Bound, ...]
    dropped: tuple[tuple[Adapter, str], ...]


def admit(request: Request, base: Base, registry: Registry, max_pixels: int) -> Admitted:
    """Raises InvalidRequest, NotFound or Refused, naming what is wrong."""
    _check_base(request, base, registry)
    settings = _settle(request, base, max_pixels)
    dropped = tuple((spec, "weight 0") for spec in request.adapters if _is_idle(spec))
    adapters = tuple(_resolve(spec, base, registry) for spec in request.adapters if not _is_idle(spec))
    for layout in base.layouts:
        rank_bucket(_columns(adapters, layout))
    coefficients = table(settings.scheduler, base.scheduler_config, settings.steps)
    return Admitted(request, settings, coefficients, adapters, dropped)


def _is_idle(spec: Adapter) -> bool:
    return spec.weight == 0 and not spec.text_weight


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


def _resolve(spec: Adapter, base: Base, registry: Registry) -> Bound:
    version = registry.resolve(spec.ref)
    version.manifest.fits(base.version.manifest)
    compatibility = version.manifest.compatibility
    if not isinstance(compatibility, LoraCompatibility):
        raise Refused(f"{version.ref} is a {version.manifest.kind}; this server serves LoRAs", ref=spec.ref)
    served = [layout.targets for layout in base.layouts]
    for target in compatibility.requires:
        if not any(target in targets for targets in served):
            raise Refused(
                f"{version.ref} changes {target}, which is outside the attention blocks; "
                "this server applies LoRAs inside attention blocks and text encoders",
                ref=spec.ref,
                target=target,
            )
    return Bound(spec, version)


def _columns(adapters: Sequence[Bound], layout: Layout) -> int:
    """Rank columns that `adapters` need together in one graph."""
    ranks = [each.version.manifest.compatibility.ranks for each in adapters]  # type: ignore[union-attr]
    return sum(max((r for name, r in each.items() if name in layout.targets), default=0) for each in ranks)
