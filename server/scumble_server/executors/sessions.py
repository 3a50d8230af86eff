"""What runs exported graphs, whatever it is: named tensors in, a list of tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from scumble_build.export.manifest import FactorLayout, Include, Port
from scumble_build.export.plan import BaseGraphs
from scumble_server.executors.limits import GraphLimits


class AboutGraph(Protocol):
    """What is asked of a graph: an exported one's manifest says the same."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...
    @property
    def includes(self) -> tuple[Include, ...]: ...
    @property
    def factors(self) -> FactorLayout | None: ...
    @property
    def levels(self) -> int: ...


class Session(Protocol):
    """One graph with its weights, in whatever runs it. Called from one thread at a time."""

    @property
    def graph(self) -> AboutGraph: ...
    @property
    def limits(self) -> GraphLimits: ...
    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """All inputs by name; outputs in the graph's order."""


class Named(Protocol):
    """By the graphs' names. Any thread may ask."""

    def __getitem__(self, name: str) -> Session: ...


class Sessions(Named, Protocol):
    """Those of one set of a base's weights."""

    @property
    def graphs(self) -> BaseGraphs: ...
