"""`scumble build engine`, `engines`, `pull`: build a published base's engines, list them, copy them to a folder."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scumble.errors import InvalidRequest, NotFound, Refused
from scumble_build.engines import profiles, store
from scumble_build.engines.api import Flavour, load
from scumble_build.engines.base import BuildTarget, build_graphs
from scumble_build.engines.builder import BuildOptions, current_sm
from scumble_build.engines.key import EngineKey, Machine, check_sm
from scumble_build.engines.profiles import Profile
from scumble_build.engines.progress import Progress
from scumble_build.engines.store import StoredEngine
from scumble_build.export.command import BaseFolder, find_base
from scumble_build.export.manifest import GraphManifest, Precision
from scumble_registry import Registry, Version, default_home
from scumble_registry.cli.printing import print_table
from scumble_registry.compatibility import ControlNetCompatibility

Base = Annotated[str, typer.Option(help="The published base or checkpoint: ns/name, ns/name@7, …")]
Net = Annotated[str | None, typer.Option(help="A published ControlNet for the base, instead of the base itself.")]
Sm = Annotated[
    list[int] | None,
    typer.Option(help="Compute capability, e.g. 89; may be repeated (TensorRT for RTX). [default: this machine's GPU]"),
]
Home = Annotated[Path | None, typer.Option(help="The registry's folder. [SCUMBLE_HOME]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
GIB = 1 << 30
_EVERY = 2.0
"""Seconds between two lines of progress."""


def engine(
    base: Base,
    controlnet: Net = None,
    flavour: Annotated[Flavour, typer.Option(help="Which TensorRT.")] = Flavour.TENSORRT,
    sm: Sm = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Only this graph (unet.small, vae_decoder, …); may be repeated.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="TOML with the shapes to build for (docs/gpu.md). [default: the base's usual sizes]"),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Floating point format of the graphs.")] = "fp16",
    level: Annotated[
        int,
        typer.Option(
            min=0, max=5, help="TensorRT's optimization level: higher builds longer and finds faster kernels."
        ),
    ] = 3,
    workspace: Annotated[
        float | None, typer.Option(min=0.0, help="GiB of scratch memory that a kernel may use.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Build engines that exist already, too.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Build engines of a base's, a checkpoint's or a ControlNet's graphs and publish them beside it."""
    load(flavour)  # fail before minutes of work
    stored = build_into(
        base,
        home or default_home(),
        flavour,
        _capabilities(sm),
        precision,
        controlnet=controlnet,
        part=part,
        wanted=profiles.read(profile) if profile is not None else None,
        options=BuildOptions(optimization_level=level, workspace=None if workspace is None else int(workspace * GIB)),
        again=again,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps({"engines": [_entry(engine) for engine in stored]}, indent=2))


def build_into(
    base: str,
    home: Path,
    flavour: Flavour,
    sm: tuple[int, ...],
    precision: Precision,
    *,
    controlnet: str | None = None,
    part: list[str] | None = None,
    wanted: tuple[Profile, ...] | None = None,
    options: BuildOptions | None = None,
    again: bool = False,
    quiet: bool = True,
) -> list[StoredEngine]:
    """Export the graphs of a base, of a checkpoint, or of a ControlNet for it, build the engines that the registry does
    not have, and publish each when it is done. `wanted`: the shapes; None: the usual ones of the base.
    """
    options = options or BuildOptions()
    if not flavour.is_rtx:
        options = replace(options, timing_cache=home / "cache" / "timing.cache")
    results: list[StoredEngine] = []
    with Registry.open(home) as registry, tempfile.TemporaryDirectory(prefix="scumble-engines-") as work:
        version = registry.resolve(controlnet or base)
        compatibility = version.manifest.compatibility
        if isinstance(compatibility, ControlNetCompatibility) and compatibility.form == "control_lora":
            raise Refused(
                f"{version.ref} is a control-LoRA: its encoder depends on the weights of the request, so it runs "
                "in torch and needs no engine",
                ref=version.ref,
            )
        existing = {engine.key.digest: engine for engine in store.listed(registry, version)}
        graphs, plans = Path(work) / "graphs", Path(work) / "plans"
        folder = find_base(base, home)
        target = BuildTarget(flavour, sm, precision, wanted or profiles.usual(*folder.sides), options)
        manifests = _export(folder, controlnet, home, graphs, part, precision, report=_report(quiet))
        if part is None and controlnet is None:
            profiles.check_names(wanted or (), manifests)
        for built in build_graphs(
            graphs,
            manifests,
            target,
            plans,
            known=lambda key: not again and key.digest in existing,
            report=lambda graph: _progress(graph, quiet=quiet),
        ):
            if built.report is None:
                stored = existing[built.key.digest]
            else:
                stored = store.publish(registry, version, built.key, built.plan, built.manifest, built.report)
                built.plan.unlink()
            results.append(stored)
            if not quiet:
                print(_line(stored, fresh=built.report is not None))
    return results


def engines(
    base: Annotated[str | None, typer.Option(help="Only those of this base, checkpoint or ControlNet.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the engines in the registry, newest first."""
    with Registry.open(home or default_home()) as registry:
        stored = store.listed(registry, registry.resolve(base) if base is not None else None)
        names = {engine.artifact.manifest.of: _name(registry, engine.artifact.manifest.of) for engine in stored}
    if as_json:
        print(json.dumps([_entry(engine) for engine in stored], indent=2))
        return
    rows: list[tuple[str, ...]] = []
    for engine in stored:
        key = engine.key
        sizes = (f"{engine.artifact.size / 1e6:,.0f}", f"{engine.artifact.created:%Y-%m-%d %H:%M}")
        where = (key.flavour, key.version, " ".join(map(str, key.sm)), key.precision)
        rows.append((key.part, names[engine.artifact.manifest.of], *where, *sizes))
    print_table(("graph", "base", "flavour", "version", "SM", "precision", "MB", "built (UTC)"), rows)


def pull(
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", help="A new or empty folder.")],
    controlnet: Net = None,
    flavour: Annotated[Flavour, typer.Option(help="Which TensorRT.")] = Flavour.TENSORRT,
    sm: Sm = None,
    precision: Annotated[Precision, typer.Option(help="Floating point format of the graphs.")] = "fp16",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check the plans and manifests that fit one machine and write them into a folder."""
    capabilities = _capabilities(sm)
    if len(capabilities) != 1:
        raise InvalidRequest("a machine has one compute capability; pass --sm once", field="sm")
    if out.exists() and any(out.iterdir()):
        raise Refused(f"{out} is not an empty folder; choose another, nothing was overwritten")
    with Registry.open(home or default_home()) as registry:
        version = registry.resolve(controlnet or base)
        machine = Machine(flavour, load(flavour).__version__, capabilities[0])
        stored = store.listed(registry, version)
        fitting = store.fitting(stored, machine, version.digest, precision)
        if not fitting:
            kinds = {_kind(engine.key) for engine in stored}
            raise NotFound(
                f"{version.ref} has no engine for {flavour} {machine.version} SM{machine.sm} {precision}, only for "
                f"{', '.join(sorted(kinds)) or 'nothing'}; build one with `scumble build engine`"
            )
        pulled = [store.pull(registry, engine) for engine in fitting.values()]
        out.mkdir(parents=True, exist_ok=True)
        for engine in pulled:
            shutil.copyfile(engine.plan, out / f"{engine.manifest.graph}.plan")
            engine.manifest.write(out / f"{engine.manifest.graph}.json")
    if as_json:
        print(json.dumps([_entry(engine.stored) for engine in pulled], indent=2))
    else:
        print(f"{len(pulled)} engines in {out}")


def _export(
    base: BaseFolder,
    controlnet: str | None,
    home: Path,
    folder: Path,
    part: list[str] | None,
    precision: Precision,
    *,
    report: Any,
) -> tuple[GraphManifest, ...]:
    from scumble_build.export.command import open_base, open_net
    from scumble_build.export.write import Exportable, write_graphs

    graphs: Exportable
    if controlnet is not None:
        graphs, digest = open_net(controlnet, base, home, precision)
    else:
        graphs, digest = open_base(base, precision), base.digest
    return write_graphs(graphs, part or graphs.names, folder, base=digest, family=base.family, report=report)


def _kind(key: EngineKey) -> str:
    return f"{key.flavour} {key.version} {' '.join(f'SM{number}' for number in key.sm)} {key.precision}"


def _capabilities(sm: list[int] | None) -> tuple[int, ...]:
    if sm:
        return tuple(dict.fromkeys(check_sm(number) for number in sm))
    here = current_sm()
    if here is None:
        raise InvalidRequest(
            "this machine has no GPU to build for; pass the compute capability, such as --sm 89", field="sm"
        )
    return (here,)


def _report(quiet: bool) -> Any:
    def report(manifest: GraphManifest) -> None:
        if not quiet:
            print(f"{manifest.graph}: exported", file=sys.stderr)

    return report


def _progress(graph: str, *, quiet: bool) -> Progress:
    last = 0.0

    def print_progress(phase: str, done: float) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            print(f"{graph}: {phase}, {done:.0%}", file=sys.stderr)

    return print_progress


def _line(stored: StoredEngine, *, fresh: bool) -> str:
    provenance = stored.artifact.manifest.provenance
    if not fresh:
        return f"{stored.key.part}: exists already ({stored.digest[:19]}…)"
    seconds, peak = provenance["build_seconds"], provenance["peak_bytes"]
    assert isinstance(seconds, float | int) and isinstance(peak, int)
    size = stored.artifact.size / 1e6
    return f"{stored.key.part}: {size:,.1f} MB in {seconds:.0f} s, peak {peak / GIB:.1f} GiB ({stored.digest[:19]}…)"


def _entry(stored: StoredEngine) -> dict[str, Any]:
    key: EngineKey = stored.key
    return {
        "digest": stored.digest,
        "of": stored.artifact.manifest.of,
        "created": stored.artifact.created.isoformat(),
        "bytes": stored.artifact.size,
        "key": key.to_dict(),
        "report": stored.artifact.manifest.provenance,
    }


def _name(registry: Registry, digest: str) -> str:
    try:
        version: Version = registry.resolve_digest(digest)
    except (NotFound, Refused):
        return digest[:19]
    return version.ref
