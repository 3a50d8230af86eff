"""Exports a graph to ONNX: by torch.export if that is fast enough, else by the TorchScript exporter.

torch.export handles every graph and writes smaller ones, but takes about fifteen times as long: most of a minute for
the demo base's denoiser, against two seconds. So the denoiser's graphs, and a ControlNet's step, which is half of one,
are exported by TorchScript (figures in docs/executors.md).
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
    """Trace a graph. Any thread may call it; calls run one at a time."""
    by: Mapping[Exporter, Callable[[Graph], Traced]] = {
        "torch.export": torch_export.trace,
        "torchscript": torch_script.trace,
    }
    with _one_at_a_time:
        return by[exporter_of(graph.part)](graph)
