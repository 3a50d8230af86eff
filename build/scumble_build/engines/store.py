"""Engines in the registry: artifacts of the base whose weights they have, found by what a machine needs.

An engine is `engine.plan` beside the `manifest.json` of its graph. It is loaded only if everything in its key matches.
One whose graph was exported by other code is stale and ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scumble.errors import Refused
from scumble_build.engines.builder import Report
from scumble_build.engines.key import EngineKey, Machine, misfits
from scumble_build.export.manifest import GraphManifest
from scumble_registry import Registry, Version
from scumble_registry.store.artifacts import Artifact

log = logging.getLogger(__name__)

KIND = "engine"
PLAN, MANIFEST = "engine.plan", "manifest.json"
RUNTIME_CACHE = "runtime.cache"
"""Beside the plan in the cache: kernels compiled for this GPU, written when a server closes the engine.

Never published.
"""


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """An engine in the registry; its files are not read yet."""

    key: EngineKey
    artifact: Artifact

    @property
    def digest(self) -> str:
        return self.artifact.digest


@dataclass(frozen=True, slots=True)
class Pulled:
    """An engine's files on this machine, checked against their digests."""

    stored: StoredEngine
    manifest: GraphManifest
    plan: Path

    @property
    def runtime_cache(self) -> Path:
        return self.plan.with_name(RUNTIME_CACHE)


def publish(
    registry: Registry,
    of: Version,
    key: EngineKey,
    plan: Path,
    manifest: Path,
    report: Report,
    more: Mapping[str, Any] | None = None,
) -> StoredEngine:
    """Publish an engine as an artifact of `of`, in place of one with the same key. `more` is added to its provenance.

    Raises Refused if it was built of another version, Unavailable.
    """
    if key.base != of.digest:
        raise Refused(f"the engine was built of {key.base}, not of {of.ref} ({of.digest}); build it again")
    files = {PLAN: plan, MANIFEST: manifest}
    provenance = {**report.to_dict(), **(more or {})}
    return StoredEngine(key, registry.publish_artifact(of, KIND, key.to_dict(), files, provenance))


def listed(registry: Registry, of: Version | None = None) -> tuple[StoredEngine, ...]:
    """List engines, newest first. One whose key another version of Scumble wrote is left out and logged."""
    engines = []
    for artifact in registry.artifacts(KIND, of):
        try:
            engines.append(StoredEngine(EngineKey.from_dict(artifact.manifest.key), artifact))
        except Refused as error:
            log.warning("engine %s: %s", artifact.digest, error)
    return tuple(engines)


def fitting(
    stored: Iterable[StoredEngine], machine: Machine, base: str, precision: str, graphs: Mapping[str, str] | None = None
) -> dict[str, StoredEngine]:
    """Return the newest engine that fits, by graph; `graphs` has the digests of graphs that are known.

    Engines that do not fit are logged with the reasons.
    """
    newest: dict[str, StoredEngine] = {}
    for engine in stored:
        reasons = misfits(engine.key, machine, base, precision, (graphs or {}).get(engine.key.part))
        if reasons:
            log.info("engine %s of %s is not used: %s", engine.digest[:19], engine.key.part, "; ".join(reasons))
        else:
            newest.setdefault(engine.key.part, engine)
    return newest


def pull(registry: Registry, stored: StoredEngine) -> Pulled:
    """Copy an engine's files to the cache. Raises IntegrityError for wrong bytes, Refused for another
    graph's manifest.
    """
    folder = registry.artifact_folder(stored.artifact)
    manifest = GraphManifest.read(folder / MANIFEST)
    if manifest.graph != stored.key.part:
        raise Refused(
            f"engine {stored.digest} is of {stored.key.part}, its manifest of {manifest.graph}; build it again"
        )
    return Pulled(stored, manifest, folder / PLAN)


def check_current(pulled: Pulled, code: str) -> None:
    """Check that the graph was exported by `code`, the digest of the code installed here. Raises Refused otherwise."""
    if pulled.manifest.code != code:
        raise Refused(
            f"the engine of {pulled.stored.key.part} is stale: its graph was exported by another version of Scumble; "
            "run `scumble build engine` again",
            graph=pulled.stored.key.part,
        )
