"""`ls`, `show`, `export`, `find`, `resolve` and `pull`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scumble.errors import InvalidRequest
from scumble_registry.cli.options import Home, Json, Ref, open_registry
from scumble_registry.cli.printing import entry, listed, note, plain, print_json, print_rows, print_table, print_version
from scumble_registry.exporting import export as write_layout
from scumble_registry.formats import FORMATS
from scumble_registry.inspection import hashes_to_dict, match_to_dict
from scumble_registry.listing import Filter, Listed, list_versions
from scumble_registry.store.catalogue import Status

app = typer.Typer()


@app.command("ls")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only this ns/name, with all its versions.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only versions of this kind, e.g. lora.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Only what was published for this base: ns/name, a reference or a digest.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Only versions with this in a trigger word.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Only versions under this license.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only versions of this status.")] = None,
    alias: Annotated[str | None, typer.Option(help="Only versions that this alias points at.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List names with their newest versions, or all versions of one name or of what the options ask for."""
    which = Filter(kind, base, trigger, license_, status, alias)
    with open_registry(home) as registry:
        if kind is not None and kind not in {form.kind for form in FORMATS}:
            known = ", ".join(form.kind for form in FORMATS)
            raise InvalidRequest(f"{kind!r} is no kind; there are {known}", field="kind")
        listed_versions = list_versions(registry, name, which)
        nothing = not registry.names()
    if as_json:
        print_json([_listed_entry(item) for item in listed_versions])
    elif not listed_versions:
        typer.echo("Nothing is published yet." if nothing else "No version is like that.")
    else:
        newest_only = name is None and which == Filter()
        print_table(_COLUMNS, map(_cells, _newest(listed_versions) if newest_only else listed_versions))


_COLUMNS = ("version", "kind", "family", "status", "aliases", "base", "trigger words", "license", "published")


def _cells(item: Listed) -> tuple[str, ...]:
    version, manifest = item.version, item.version.manifest
    return (
        version.ref,
        manifest.kind,
        manifest.compatibility.family or "?",
        version.status,
        ", ".join(item.aliases),
        item.base or "",
        listed(manifest.trigger_words, most=4),
        plain(manifest.license or "", 40),
        f"{version.created:%Y-%m-%d %H:%M}",
    )


def _newest(items: Iterable[Listed]) -> list[Listed]:
    """Return the newest version of each name, with the aliases of the older ones as `alias → number`."""
    newest: dict[str, Listed] = {}
    elsewhere = defaultdict[str, list[str]](list)
    for item in items:  # oldest first
        name = item.version.name
        if name in newest:
            older = newest[name]
            elsewhere[name] += [f"{alias} → {older.version.version}" for alias in older.aliases]
        newest[name] = item
    return [replace(item, aliases=(*item.aliases, *elsewhere[name])) for name, item in newest.items()]


def _listed_entry(item: Listed) -> dict[str, Any]:
    manifest = item.version.manifest
    return entry(item.version) | {
        "aliases": list(item.aliases),
        "family": manifest.compatibility.family,
        "base": manifest.base,
        "base_ref": item.base if item.base != manifest.base else None,
        "trigger_words": list(manifest.trigger_words),
        "license": manifest.license,
    }


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
        "sample grid": manifest.sample_grid and manifest.sample_grid.digest,
        "card": manifest.card and manifest.card.digest,
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
    rows = [(match.version, match.kind or "version", match.hex) for match in matches]
    print_table(
        ("version", "kind", "status", "same", "hash"),
        [(version.ref, version.manifest.kind, version.status, same, hex_) for version, same, hex_ in rows],
    )


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
    about: Annotated[
        bool,
        typer.Option("--about", help="With sample grid, card and training.json, as a training leaves them."),
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write the files of a version into a folder, and check their hashes."""
    with open_registry(home) as registry:
        version = registry.pull(ref, out, about=about)
    print_version(version, as_json, f"{version.ref}: {len(version.manifest.files)} files in {out}")
    note(version)
