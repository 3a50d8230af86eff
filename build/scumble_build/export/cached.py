"""A cache of exported graphs without weights, keyed by everything that their structure depends on.

        CACHE/onnx/3f9c….onnx, 3f9c….json      the model, and the tensor that each of its initializers holds

The key is a digest of the graph's name, its component's config, the precision, this package's code and the versions of
the exporters. Weights are not in it, so a base, its variants and every base of the same structure share one file.
Processes may read and write concurrently: files are written by rename, the model's last. Files may be deleted at any
time.
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

from scumble.files import private_folder, write_whole
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
        """Return the trace of the graph that `graph` makes. If it is not cached, tracing takes seconds to minutes."""
        stem = self._folder / key(name, precision, config)
        traced = _read(stem)
        if traced is None:
            log.warning("exporting %s in %s to ONNX, cached in %s", name, precision, self._folder)
            start = time.monotonic()
            traced = trace(graph())
            self._write(stem, traced)
            log.warning("exported %s in %.0f s", name, time.monotonic() - start)
        return traced

    def _write(self, stem: Path, traced: Traced) -> None:
        private_folder(self._folder)
        write_whole(stem.with_suffix(".json"), json.dumps(dict(traced.parameters)).encode())
        write_whole(stem.with_suffix(".onnx"), traced.model.SerializeToString())


def key(name: str, precision: str, config: Mapping[str, Any]) -> str:
    """Return the digest of a graph's structure, the name of its files."""
    made_of = {
        "graph": name,
        "precision": precision,
        "config": config,
        "code": code_digest(),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _read(stem: Path) -> Traced | None:
    """Read a trace; None if it is missing or damaged, to be exported again."""
    try:
        model = onnx.load_model(stem.with_suffix(".onnx"), load_external_data=False)
        parameters = json.loads(stem.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - protobuf's error has no public name
        log.warning("%s is damaged and will be exported again: %s", stem.with_suffix(".onnx"), error)
        return None
    named = isinstance(parameters, dict) and {tensor.name for tensor in model.graph.initializer} == set(parameters)
    return Traced(model, parameters) if named else None
