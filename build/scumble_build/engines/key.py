"""The key of an engine: everything that decides what it computes and where it runs. Two keys that differ in anything
are two engines; an engine is loaded only where every part of its key is what the machine and the base ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from scumble.errors import Refused
from scumble_build.engines.api import Flavour
from scumble_registry.manifest import canonical_json, digest_of

SM = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
"""Compute capabilities that are known by number: 89 is 8.9."""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """`sm` are the compute capabilities that the plan is for. `graph` is the digest of the exported graph with its
    weights, `layout` that of where factors stand in it; `profiles` and `flags` are as they were given to the builder.
    The driver is not part: engines are bound to TensorRT's version and the GPU's capability, and what a driver lacks
    shows when one is loaded.
    """

    part: str
    graph: str
    base: str
    flavour: Flavour
    version: str
    sm: tuple[int, ...]
    precision: str
    layout: str
    profiles: Sequence[Mapping[str, Any]]
    flags: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flavour": self.flavour.value, "sm": list(self.sm)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises Refused for a key of a newer or older scumble."""
        try:
            return cls(**{**data, "flavour": Flavour(data["flavour"]), "sm": tuple(data["sm"])})
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"this engine's key is not one that this scumble writes ({error}); build it again") from error


@dataclass(frozen=True, slots=True)
class Machine:
    """What an engine must have been built for to run here."""

    flavour: Flavour
    version: str
    sm: int


def misfits(key: EngineKey, machine: Machine, base: str, precision: str, graph: str | None = None) -> list[str]:
    """What keeps an engine from being loaded, in words; empty if nothing does. `graph` None: whichever."""
    wanted: dict[str, tuple[object, object]] = {
        "base": (key.base, base),
        "flavour": (key.flavour, machine.flavour),
        f"{machine.flavour} version": (key.version, machine.version),
        "precision": (key.precision, precision),
    }
    if graph is not None:
        wanted["graph"] = (key.graph, graph)
    wrong = [f"its {what} is {has}, not {needs}" for what, (has, needs) in wanted.items() if has != needs]
    if machine.sm not in key.sm:
        wrong.append(f"it is for SM{', SM'.join(map(str, key.sm))}, not for SM{machine.sm}")
    return wrong


def check_sm(sm: int) -> int:
    """Raises Refused for what is no compute capability."""
    if sm not in SM:
        raise Refused(f"--sm {sm} is no compute capability; there are {', '.join(map(str, SM))} (89 is 8.9)", sm=sm)
    return sm
