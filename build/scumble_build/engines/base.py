"""Builds engines from a base's exported graphs, one by one. Exporting comes first, so that the networks are no longer
in memory while TensorRT builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import InvalidRequest
from scumble_build.engines import profiles
from scumble_build.engines.api import Flavour, load
from scumble_build.engines.builder import BuildOptions, Report, build
from scumble_build.engines.key import EngineKey
from scumble_build.engines.profiles import Profile
from scumble_build.engines.progress import Progress
from scumble_build.export.manifest import SUFFIX, GraphManifest, Precision
from scumble_registry.manifest import canonical_json, digest_of

DEFAULT = BuildOptions()


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """The machine, precision and shapes that engines are built for."""

    flavour: Flavour
    sm: tuple[int, ...]
    precision: Precision
    profiles: tuple[Profile, ...] = ()
    options: BuildOptions = DEFAULT


@dataclass(frozen=True, slots=True)
class Built:
    """An engine's files. `report` is None for an engine that existed already and was not built."""

    key: EngineKey
    manifest: Path
    plan: Path
    report: Report | None


def read_manifests(folder: Path, graphs: Sequence[str]) -> tuple[GraphManifest, ...]:
    return tuple(GraphManifest.read(folder / f"{graph}{SUFFIX}") for graph in graphs)


def key_of(manifest: GraphManifest, target: BuildTarget) -> EngineKey:
    """Return the key of the engine to build. Raises Unavailable if the flavour is not installed, InvalidRequest for a
    profile outside the graph's axes.
    """
    factors = manifest.factors.model_dump(mode="json") if manifest.factors is not None else None
    chosen = profiles.of(manifest, target.profiles)
    for profile in chosen:
        profile.shapes(manifest)
    return EngineKey(
        part=manifest.graph,
        graph=digest_of(f"{manifest.onnx.sha256} {manifest.weights.sha256}".encode()),
        base=manifest.base,
        flavour=target.flavour,
        version=load(target.flavour).__version__,
        sm=target.sm,
        precision=target.precision,
        layout=digest_of(canonical_json(factors)),
        profiles=profiles.described(manifest, chosen),
        flags=target.options.flags(),
    )


def build_graphs(
    folder: Path,
    manifests: Sequence[GraphManifest],
    target: BuildTarget,
    out: Path,
    *,
    known: Callable[[EngineKey], bool] = lambda _key: False,
    report: Callable[[str], Progress] = lambda _graph: lambda _phase, _done: None,
) -> Iterator[Built]:
    """Build engines of exported graphs and yield each when it is done; those that are `known` are not built.

    Raises as `build` does; the target is checked for all graphs before the first is built.
    """
    if not manifests:
        raise InvalidRequest("there is no graph to build", field="part")
    keys = [key_of(manifest, target) for manifest in manifests]
    out.mkdir(parents=True, exist_ok=True)
    for manifest, key in zip(manifests, keys, strict=True):
        plan = out / f"{manifest.graph}.plan"
        built = None
        if not known(key):
            built = build(
                folder / manifest.onnx.name,
                manifest,
                plan,
                flavour=target.flavour,
                sm=target.sm,
                profiles=profiles.of(manifest, target.profiles),
                options=target.options,
                progress=report(manifest.graph),
            )
        yield Built(key, folder / f"{manifest.graph}{SUFFIX}", plan, built)
