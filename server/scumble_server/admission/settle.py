"""Fills a request's gaps: what it leaves out comes from its adapters and its base."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, TypeVar

from scumble.errors import InvalidRequest
from scumble.request import SDXL_OPTIONS, Options, Request
from scumble_registry.manifest import Sampling
from scumble_server.admission import sampling
from scumble_server.base import Base
from scumble_server.denoise.schedulers import first_step
from scumble_server.executors.limits import check_any
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.original import Original, strength_of
from scumble_server.request.settings import Settings

Value = TypeVar("Value")


def settle_passes(
    request: Request, base: Base, adapters: Sequence[ResolvedAdapter], original: Original | None, max_pixels: int
) -> list[Settings]:
    """Settle the first pass, and the second, at a larger size, if the request asks for one.

    Raises InvalidRequest, or Refused for sizes that the base's engines were not built for.
    """
    strength, sampled = strength_of(request.options), sampling.settle(request, adapters, base.defaults)
    hires = request.options.hires
    size = _size(request, base, original)
    _check_size(size, base, max_pixels, "width")
    first = _settle(request, base, sampled, size, strength)
    if hires is None:
        return [first]
    larger = tuple(max(8, round(side * hires.scale / 8) * 8) for side in size)
    _check_size((larger[0], larger[1]), base, max_pixels, "options.hires.scale")
    again = request.model_copy(update={"seed": first.seed})
    steps = sampled.model_copy(update={"steps": hires.steps or first.steps})
    return [first, _settle(again, base, steps, (larger[0], larger[1]), hires.strength)]


def _size(request: Request, base: Base, original: Original | None) -> tuple[int, int]:
    """Width and height: the request's; else its original's, in steps of 8; else the base's own."""
    default = base.defaults.width, base.defaults.height
    if original is not None and request.width is None and request.height is None:
        width, height = (max(8, side // 8 * 8) for side in original.picture.size)
        default = width, height
    return _given_or(request.width, default[0]), _given_or(request.height, default[1])


def _check_size(size: tuple[int, int], base: Base, max_pixels: int, field: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{width}x{height} is {width * height} pixels, this server makes at most {max_pixels}; "
            f"ask for a smaller {field}",
            field=field,
        )
    scale = base.compatibility.vae_scale
    check_any(base.limits, {"width": width // scale, "height": height // scale})


def _settle(request: Request, base: Base, sampled: Sampling, size: tuple[int, int], strength: float) -> Settings:
    """Give every field of a pass a value. Raises InvalidRequest for options that the base cannot follow."""
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


def _first_step(strength: float, steps: int) -> int:
    start = first_step(steps, strength)
    if start == steps:
        raise InvalidRequest(
            f"strength {strength:g} of {steps} steps is less than one step; ask for more of either",
            field="options.strength",
        )
    return start


def _sdxl(options: Options, base: Base, width: int, height: int) -> dict[str, Any]:
    """The settings that only SDXL reads. Raises InvalidRequest for an option that the base cannot follow."""
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


def _given_or(value: Value | None, default: Value) -> Value:
    return default if value is None else value
