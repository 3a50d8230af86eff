"""Engines in the registry: artifacts of the base that their weights are of, found by what a machine needs.

An engine is `engine.plan` beside the `manifest.json` of its graph. It is loaded only where everything in its key fits;
one that was built from graphs which this code no longer makes is stale, and treated as if it were not there.
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
"""Beside the plan in the cache: kernels as this GPU finished them, written when a server closes the engine.

Never published.
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """An engine of the registry, not yet read."""

    key: EngineKey
    artifact: Artifact

    @property
    def digest(self) -> str:
        return self.artifact.digest


@dataclass(frozen=True, slots=True)
class Pulled:
    """An engine's files on this machine, checked against their digests."""

    stored: Stored
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
    about: Mapping[str, Any] | None = None,
) -> Stored:
    """What has the same key goes. Raises Unavailable."""
    if key.base != of.digest:
        raise Refused(f"the engine was built of {key.base}, not of {of.ref} ({of.digest}); build it again")
    files = {PLAN: plan, MANIFEST: manifest}
    provenance = {**report.to_dict(), **(about or {})}
    return Stored(key, registry.publish_artifact(of, KIND, key.to_dict(), files, provenance))


def listed(registry: Registry, of: Version | None = None) -> tuple[Stored, ...]:
    """Newest first. One whose key is of another scumble is left out, and said in the log."""
    found = []
    for artifact in registry.artifacts(KIND, of):
        try:
            found.append(Stored(EngineKey.from_dict(artifact.manifest.key), artifact))
        except Refused as error:
            log.warning("engine %s: %s", artifact.digest, error)
    return tuple(found)


def fitting(
    stored: Iterable[Stored], machine: Machine, base: str, precision: str, graphs: Mapping[str, str] | None = None
) -> dict[str, Stored]:
    """By graph, the newest engine that fits; `graphs` has digests of the graphs, where they are known.

    What does not fit is said in the log, once for each reason.
    """
    found: dict[str, Stored] = {}
    for each in stored:
        reasons = misfits(each.key, machine, base, precision, (graphs or {}).get(each.key.part))
        if reasons:
            log.info("engine %s of %s is left alone: %s", each.digest[:19], each.key.part, "; ".join(reasons))
        else:
            found.setdefault(each.key.part, each)
    return found


def pull(registry: Registry, stored: Stored) -> Pulled:
    """Fill the cache. Raises IntegrityError for bytes that are not what was published, Refused for a stale graph."""
    folder = registry.artifact_folder(stored.artifact)
    manifest = GraphManifest.read(folder / MANIFEST)
    if manifest.graph != stored.key.part:
        raise Refused(
            f"engine {stored.digest} is of {stored.key.part}, its manifest of {manifest.graph}; build it again"
        )
    return Pulled(stored, manifest, folder / PLAN)


def check_current(pulled: Pulled, code: str) -> None:
    """Raises Refused if the graph was exported by other code than `code`, the digest of what is installed here."""
    if pulled.manifest.code != code:
        raise Refused(
            f"the engine of {pulled.stored.key.part} is stale: its graph was exported by another scumble; "
            "run `scumble build engine` again",
            graph=pulled.stored.key.part,
        )
