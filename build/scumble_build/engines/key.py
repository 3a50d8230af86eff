"""The key of an engine: everything that decides what it computes and where it runs.

An engine is loaded only if every part of its key matches the machine and the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from scumble.errors import Refused
from scumble_build.engines.api import Flavour
from scumble_registry.manifest import canonical_json, digest_of

SM = (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)
"""The known compute capabilities: 89 is 8.9."""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """`sm` are the compute capabilities that the plan is for. `graph` is the digest of the exported graph with its
    weights, `layout` that of its layout of factors; `profiles` and `flags` are the builder's. The driver is not part of
    the key: engines depend on TensorRT's version and the GPU's capability, and a driver that is too old fails on
    loading.
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
        """Read a key from JSON. Raises Refused for a key that another version of Scumble wrote."""
        try:
            return cls(**{**data, "flavour": Flavour(data["flavour"]), "sm": tuple(data["sm"])})
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"this engine's key was written by another version of Scumble ({error}); build it again"
            ) from error


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, as an engine's key must match it."""

    flavour: Flavour
    version: str
    sm: int


def misfits(key: EngineKey, machine: Machine, base: str, precision: str, graph: str | None = None) -> list[str]:
    """Return the reasons why an engine cannot be loaded, empty if it can. `graph` None matches every graph."""
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
    """Return `sm` if it is a compute capability. Raises Refused otherwise."""
    if sm not in SM:
        raise Refused(f"--sm {sm} is no compute capability; there are {', '.join(map(str, SM))} (89 is 8.9)", sm=sm)
    return sm
