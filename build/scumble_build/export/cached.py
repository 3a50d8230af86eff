"""Graphs without weights, kept on disk by all that their structure depends on.

    CACHE/onnx/3f9c….onnx, 3f9c….json      the model, and which tensor each of its initializers is

The key is a digest over the graph's name, its component's config, the precision, our code and the versions of what
traces it: never the weights, so a base, its variants and every base of the same structure share one file. Any process
may read and write at once: files come by rename, the model's last. What is here may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx

from scumble_build.export.files import write_by_rename
from scumble_build.export.graph import Graph
from scumble_build.export.provenance import code_digest, versions
from scumble_build.export.tracing.trace import trace
from scumble_build.export.tracing.traced import Traced

log = logging.getLogger(__name__)


class GraphCache:
    """Owns one folder. Any thread may call it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def traced(self, graph: Callable[[], Graph], name: str, precision: str, config: Mapping[str, Any]) -> Traced:
        """The graph that `graph` makes; traced now if it is not there, which takes from seconds to minutes."""
        stem = self._folder / key(name, precision, config)
        found = _read(stem)
        if found is None:
            log.warning("exporting %s in %s to ONNX; it is kept in %s", name, precision, self._folder)
            start = time.monotonic()
            found = trace(graph())
            self._keep(stem, found)
            log.warning("exported %s in %.0f s", name, time.monotonic() - start)
        return found

    def _keep(self, stem: Path, traced: Traced) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_by_rename(stem.with_suffix(".json"), json.dumps(dict(traced.parameters)).encode())
        write_by_rename(stem.with_suffix(".onnx"), traced.model.SerializeToString())


def key(name: str, precision: str, config: Mapping[str, Any]) -> str:
    """Names the structure of a graph."""
    made_of = {
        "graph": name,
        "precision": precision,
        "config": config,
        "code": code_digest(),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _read(stem: Path) -> Traced | None:
    """None if it is not there, or not sound: then it is made anew."""
    try:
        model = onnx.load_model(stem.with_suffix(".onnx"), load_external_data=False)
        parameters = json.loads(stem.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - protobuf's own has no name to catch
        log.warning("%s is damaged and will be exported again: %s", stem.with_suffix(".onnx"), error)
        return None
    named = isinstance(parameters, dict) and {each.name for each in model.graph.initializer} == set(parameters)
    return Traced(model, parameters) if named else None
