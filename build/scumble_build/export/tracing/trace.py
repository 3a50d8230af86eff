"""A graph → ONNX, by torch.export where it takes the graph in bearable time, else by the TorchScript exporter.

torch.export takes every graph there is, and makes smaller ones of them, but needs about fifteen times as long: most of
a minute for the demo base's denoiser, which the other traces in two seconds. So the denoiser's graphs, and a
ControlNet's step, which is half of one, are left to the other (docs/executors.md has the figures).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from scumble_build.export.graph import Graph
from scumble_build.export.manifest import GraphPart
from scumble_build.export.tracing import torch_export, torch_script
from scumble_build.export.tracing.traced import Exporter, Traced

_BY_TORCHSCRIPT: frozenset[GraphPart] = frozenset(("denoiser", "controlnet"))
_one_at_a_time = threading.Lock()


def exporter_of(part: GraphPart) -> Exporter:
    return "torchscript" if part in _BY_TORCHSCRIPT else "torch.export"


def trace(graph: Graph) -> Traced:
    """Callers may be of any thread; one is served at a time."""
    by: Mapping[Exporter, Callable[[Graph], Traced]] = {
        "torch.export": torch_export.trace,
        "torchscript": torch_script.trace,
    }
    with _one_at_a_time:
        return by[exporter_of(graph.part)](graph)
