"""Exported graphs as an executor runs them, in ONNX Runtime or TensorRT: named tensors in, a list of tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from scumble_build.export.manifest import FactorLayout, Port
from scumble_build.export.plan import BaseGraphs
from scumble_build.graphs.includes import Include
from scumble_server.executors.limits import GraphLimits


class GraphDescription(Protocol):
    """What an executor must know of a graph to feed it: an exported graph's manifest says the same."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...
    @property
    def includes(self) -> tuple[Include, ...]: ...
    @property
    def factors(self) -> FactorLayout | None: ...
    @property
    def levels(self) -> int: ...


class Session(Protocol):
    """One graph with its weights. Called from one thread at a time."""

    @property
    def graph(self) -> GraphDescription: ...
    @property
    def limits(self) -> GraphLimits: ...
    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """All inputs by name → outputs in the graph's order."""


class NamedSessions(Protocol):
    """The sessions of a ControlNet, or of a base, by the names of their graphs. For any thread."""

    def __getitem__(self, name: str) -> Session: ...

    def close(self) -> None:
        """Write down what the next start can use. Called once, when no thread runs a session any more."""


class BaseSessions(NamedSessions, Protocol):
    """The sessions of one set of a base's weights."""

    @property
    def graphs(self) -> BaseGraphs: ...
