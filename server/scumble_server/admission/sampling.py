"""How a request is sampled: as it says itself, else as its adapters were made for, else as the base says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scumble.errors import InvalidRequest
from scumble.request import MAX_STEPS, Request
from scumble_registry.manifest import Defaults, Sampling
from scumble_server.methods import method_of
from scumble_server.request.adapter import ResolvedAdapter

SCHEDULER_OPTIONS = ("timestep_spacing", "rescale_betas", "eta")
"""Fields of a request's options, which a profile has too; they belong to the scheduler that it names."""


def settle(request: Request, adapters: Sequence[ResolvedAdapter], defaults: Defaults) -> Sampling:
    """Give `scheduler`, `steps` and `guidance_scale` a value; an option that stays None is left to the base's config.

    Raises InvalidRequest where two adapters were made for different values and the request names none.
    """
    profiles = {
        adapter.spec.ref: adapter.version.manifest.sampling
        for adapter in adapters
        if adapter.version.manifest.sampling is not None and method_of(adapter).idle(adapter, MAX_STEPS) is None
    }
    settled: dict[str, Any] = {}
    for name in ("scheduler", "steps", "guidance_scale"):
        settled[name] = _chosen(name, getattr(request, name), profiles, getattr(defaults, name))
    meant = {ref: profile for ref, profile in profiles.items() if profile.scheduler == settled["scheduler"]}
    for name in SCHEDULER_OPTIONS:
        settled[name] = _chosen(f"options.{name}", getattr(request.options, name), meant, None)
    return Sampling(**settled)


def _chosen(field: str, asked: Any, profiles: Mapping[str, Sampling], default: Any) -> Any:
    """Return what the request asks for, else what the profiles with a value agree on, else the default."""
    if asked is not None:
        return asked
    name = field.rpartition(".")[2]
    wanted = {ref: value for ref, profile in profiles.items() if (value := getattr(profile, name)) is not None}
    if len(set(wanted.values())) > 1:
        wishes = ", ".join(f"{ref} for {name} {value}" for ref, value in wanted.items())
        raise InvalidRequest(f"the adapters were made for different sampling: {wishes}; set {field}", field=field)
    return next(iter(wanted.values()), default)
