"""How a request is sampled: as it says itself, else as its adapters were made for, else as the base says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scumble.errors import InvalidRequest
from scumble.request import MAX_STEPS, Request
from scumble_registry.manifest import Defaults, Sampling
from scumble_server.methods import METHODS
from scumble_server.request.adapter import Bound

SCHEDULER_OPTIONS = ("timestep_spacing", "rescale_betas", "eta")
"""Fields of a request's options, which a profile has too; they belong to the scheduler that it names."""


def settle(request: Request, adapters: Sequence[Bound], defaults: Defaults) -> Sampling:
    """`scheduler`, `steps` and `guidance_scale` have a value; an option that is None is as the base's config says.

    Raises InvalidRequest where two adapters were made for different values and the request names none.
    """
    profiles = {
        bound.spec.ref: bound.version.manifest.sampling
        for bound in adapters
        if bound.version.manifest.sampling is not None and METHODS[bound.kind].idle(bound, MAX_STEPS) is None
    }
    settled: dict[str, Any] = {}
    for name in ("scheduler", "steps", "guidance_scale"):
        settled[name] = _chosen(name, getattr(request, name), profiles, getattr(defaults, name))
    meant = {ref: profile for ref, profile in profiles.items() if profile.scheduler == settled["scheduler"]}
    for name in SCHEDULER_OPTIONS:
        settled[name] = _chosen(f"options.{name}", getattr(request.options, name), meant, None)
    return Sampling(**settled)


def _chosen(field: str, asked: Any, profiles: Mapping[str, Sampling], default: Any) -> Any:
    """What the request asks for, else what all profiles say that say anything, else the default."""
    if asked is not None:
        return asked
    name = field.rpartition(".")[2]
    said = {ref: value for ref, profile in profiles.items() if (value := getattr(profile, name)) is not None}
    if len(set(said.values())) > 1:
        wishes = ", ".join(f"{ref} for {name} {value}" for ref, value in said.items())
        raise InvalidRequest(f"the adapters were made for different sampling: {wishes}; set {field}", field=field)
    return next(iter(said.values()), default)
