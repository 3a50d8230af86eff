"""Protocols of the sessions that run exported graphs in ONNX Runtime or TensorRT: named tensors in, a list out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from scumble_build.export.manifest import FactorLayout, Port
from scumble_build.export.plan import BaseGraphs
from scumble_build.graphs.includes import Include
from scumble_server.executors.limits import GraphLimits


class GraphDescription(Protocol):
    """The description of a graph that feeds are made for; a subset of an exported graph's manifest."""

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
        """Run the graph on all inputs, by name. Returns the outputs in the graph's order."""


class NamedSessions(Protocol):
    """The sessions of a ControlNet or a base, by name of graph. Any thread may call it."""

    def __getitem__(self, name: str) -> Session: ...

    def close(self) -> None:
        """Save what the next start can use. Called once, after the last run of a session."""


class BaseSessions(NamedSessions, Protocol):
    """The sessions of one set of a base's weights."""

    @property
    def graphs(self) -> BaseGraphs: ...
