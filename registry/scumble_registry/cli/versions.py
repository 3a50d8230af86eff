"""`ls`, `show`, `export`, `find`, `resolve` and `pull`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scumble_registry.cli.options import Home, Json, Ref, open_registry
from scumble_registry.cli.printing import entry, listed, note, plain, print_json, print_rows, print_version
from scumble_registry.exporting import export as write_layout
from scumble_registry.inspection import hashes_to_dict, match_to_dict

app = typer.Typer()


@app.command("ls")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="Only this ns/name, with all its versions.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List names, or the versions of one."""
    with open_registry(home) as registry:
        names = (name,) if name else registry.names()
        per_name = [(registry.versions(name_), registry.aliases(name_)) for name_ in names]
    if as_json:
        print_json([entry(version, aliases) for versions, aliases in per_name for version in versions])
        return
    table = Table("version", "kind", "family", "status", "aliases", "published", box=None)
    for versions, aliases in per_name:
        for version in versions if name else versions[-1:]:
            pointing = ", ".join(alias for alias, number in aliases.items() if number == version.version)
            family = version.manifest.compatibility.family or "?"
            created = f"{version.created:%Y-%m-%d %H:%M}"
            table.add_row(version.ref, version.manifest.kind, family, version.status, pointing, created)
    Console().print(table if per_name else "Nothing is published yet.")


@app.command()
def show(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Show what a version is: status, files, compatibility, provenance."""
    with open_registry(home) as registry:
        version = registry.find(ref)
        aliases = registry.aliases(version.name)
        hashes = hashes_to_dict(registry.hashes(version))
    record = version.manifest.record.digest if version.manifest.record else None
    if as_json:
        details = {"record": record, "hashes": hashes, "manifest": json.loads(version.manifest.canonical())}
        print_json(entry(version, aliases) | details)
        return
    manifest = version.manifest
    rows: dict[str, Any] = {
        "version": version.ref,
        "status": version.status,
        "digest": version.digest,
        "kind": manifest.kind,
        "family": manifest.compatibility.family or "?",
        "aliases": ", ".join(alias for alias, number in aliases.items() if number == version.version),
        "published": f"{version.created:%Y-%m-%d %H:%M} UTC",
        "base": manifest.base,
        "image encoder": manifest.image_encoder,
        "dialect": plain(manifest.dialect or ""),
        "trigger words": listed(manifest.trigger_words, most=100),
        "license": plain(manifest.license or ""),
        "description": plain(manifest.description, 20_000),
        "defaults": manifest.defaults and manifest.defaults.model_dump_json(),
        "sampling": manifest.sampling and manifest.sampling.model_dump_json(),
        "metrics": manifest.metrics and json.dumps(manifest.metrics),
        "training": manifest.training and json.dumps(manifest.training),
        "left out": listed(manifest.leftover),
        "provenance": manifest.provenance and json.dumps(manifest.provenance),
        "AutoV2": hashes["autov2"],
        "AutoV3": hashes["autov3"],
        "record": record,
        "files": "\n".join(f"{blob.size:>12,}  {name}" for name, blob in manifest.files.items()),
    }
    print_rows(rows)


@app.command()
def export(
    ref: Ref,
    layout: Annotated[str, typer.Option(help="diffusers, kohya, peft or webui; not every kind has all.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new or empty folder.", metavar="DIR")],
    base: Annotated[
        str | None,
        typer.Option(help="The base whose module names are written; by default the one that it was published for."),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write a version in a layout that other tools read."""
    with open_registry(home) as registry:
        version = write_layout(registry, ref, layout, out, base=base)
    print_version(version, as_json, f"{version.ref} as {layout}: {out}")
    note(version)


@app.command()
def find(
    hash_: Annotated[
        str, typer.Argument(help="8 to 64 digits of a sha256, an AutoV2, an AutoV3 or a digest.", metavar="HASH")
    ],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find versions by the hash of a published file, of its tensors, of the record or of the manifest."""
    with open_registry(home) as registry:
        matches = registry.find_hash(hash_)
    if as_json:
        print_json([match_to_dict(match) for match in matches])
        return
    table = Table("version", "kind", "status", "same", "hash", box=None)
    for match in matches:
        version = match.version
        table.add_row(version.ref, version.manifest.kind, version.status, match.kind or "version", match.hex)
    Console().print(table)


@app.command()
def resolve(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Print the version that a reference resolves to. A quarantined one is refused."""
    with open_registry(home) as registry:
        version = registry.resolve(ref)
    print_version(version, as_json, f"{version.ref} {version.digest}")
    note(version)


@app.command()
def pull(
    ref: Ref,
    out: Annotated[Path, typer.Option("-o", "--out", help="A new or empty folder.", metavar="DIR")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write the files of a version into a folder, and check their hashes."""
    with open_registry(home) as registry:
        version = registry.pull(ref, out)
    print_version(version, as_json, f"{version.ref}: {len(version.manifest.files)} files in {out}")
    note(version)
