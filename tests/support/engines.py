"""Exported graphs as engines of TensorRT's stand-in. To trace one takes seconds, so a cache on disk is asked first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from scumble_build.engines.api import Flavour
from scumble_build.engines.key import EngineKey
from scumble_build.engines.profiles import WHOLE, Profile, described
from scumble_build.engines.store import Pulled, StoredEngine
from scumble_build.export.cached import GraphCache
from scumble_build.export.graph import Graph
from scumble_build.export.write import write_graphs
from support.fake_tensorrt import make_plan

if TYPE_CHECKING:
    from scumble_build.export.tracing.traced import Traced


def make_engines(
    graphs: Any,
    names: Sequence[str],
    folder: Path,
    cache: Path,
    *,
    of: str,
    profile: Profile = WHOLE,
    artifact: str = "engine",
) -> dict[str, Pulled]:
    """Of these graphs of a base or a net, for the version whose digest is `of`; files go to `folder`.

    `artifact` names them in receipts.
    """

    def traced(graph: Graph) -> Traced:
        return GraphCache(cache).traced(lambda: graph, graph.name, graph.precision, graphs.config(graph.name))

    engines: dict[str, Pulled] = {}
    with patch("scumble_build.export.write.trace", traced):
        manifests = write_graphs(graphs, names, folder, base=of, family="sd1")
    for manifest in manifests:
        plan = folder / f"{manifest.graph}.plan"
        make_plan(folder / manifest.onnx.name, manifest, (profile,), plan)
        shapes = described(manifest, (profile,))
        key = EngineKey(manifest.graph, "g", of, Flavour.TENSORRT, "11", (89,), manifest.precision, "l", shapes, {})
        stored = StoredEngine(key, SimpleNamespace(digest=f"sha256:{artifact}"))  # type: ignore[arg-type]
        engines[manifest.graph] = Pulled(stored, manifest, plan)
    return engines
