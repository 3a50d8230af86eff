"""`scumble registry …`: the registry's methods as commands. `--json` prints one JSON document for programs.

Errors are ScumbleErrors; the main command prints them and exits with their status.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scumble.errors import InvalidRequest, NotFound
from scumble_registry.catalogue import Status, Version
from scumble_registry.extract import extract
from scumble_registry.paths import default_home
from scumble_registry.references import parse_version
from scumble_registry.registry import Registry

app = typer.Typer(help="Publish, find and check adapters and bases.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Where the registry is. [default: $SCUMBLE_HOME or ~/.scumble]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Ref = Annotated[str, typer.Argument(help="ns/name, ns/name@7, ns/name@prod or ns/name@sha256:…", metavar="REF")]


@app.command()
def publish(
    path: Annotated[
        Path,
        typer.Argument(help="An adapter's safetensors file, or a folder (of a base, say).", metavar="FILE-OR-DIR"),
    ],
    name: Annotated[str, typer.Option(help="ns/name to publish as.")],
    base: Annotated[str | None, typer.Option(help="The base that the adapter is for; checked now.")] = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="What an IP-Adapter reads pictures with, if it does not bring its own.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Also point this alias at the version.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="SPDX identifier, e.g. Apache-2.0.")] = None,
    staged: Annotated[bool, typer.Option("--staged", help="Do not approve it yet.")] = False,
    trigger: Annotated[
        list[str] | None, typer.Option(help="A trigger word; may be repeated. Of an embedding, the first is its token.")
    ] = None,
    description: Annotated[str, typer.Option(help="One or two sentences.")] = "",
    sample_grid: Annotated[Path | None, typer.Option(help="A picture that shows what it does.")] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="""How it was made to be sampled: JSON or a file, e.g. '{"scheduler": "lcm", "steps": 4}'."""
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Publish a file or folder as the next version. The same content again gives the same version back."""
    with _open(home, create=True) as registry:
        version = registry.publish(
            path,
            name,
            base=base,
            image_encoder=image_encoder,
            alias=alias,
            license=licence,
            staged=staged,
            trigger_words=trigger or (),
            description=description,
            sample_grid=sample_grid,
            sampling=_read_sampling(sampling) if sampling is not None else None,
        )
    _say(version, as_json, f"{version.ref} ({version.status}) {version.digest}")


@app.command("extract")
def extract_factors(
    ref: Ref,
    rank: Annotated[int, typer.Option(min=1, help="Columns of the factors; more keep more.")],
    name: Annotated[str, typer.Option(help="ns/name to publish the LoRA as.")],
    alias: Annotated[str | None, typer.Option(help="Also point this alias at the version.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint's differences to its base as a LoRA, and say how much of them it keeps."""
    with _open(home) as registry, tempfile.TemporaryDirectory() as work:
        version = extract(registry, ref, rank, name, Path(work), alias=alias)
    metrics = version.manifest.metrics
    left = metrics["not_expressed"]
    kept = f"{metrics['energy_kept']:.1%} of the change" if isinstance(metrics["energy_kept"], float) else ""
    more = f", without {len(left)} biases and norms" if isinstance(left, list) and left else ""
    _say(version, as_json, f"{version.ref} ({version.status}) {version.digest}\nkeeps {kept}{more}")


@app.command("ls")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="Only this ns/name, with all its versions.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List names, or the versions of one."""
    with _open(home) as registry:
        names = (name,) if name else registry.names()
        found = [(registry.versions(each), registry.aliases(each)) for each in names]
    if as_json:
        _print_json([_entry(version, aliases) for versions, aliases in found for version in versions])
        return
    table = Table("version", "kind", "family", "status", "aliases", "published", box=None)
    for versions, aliases in found:
        for version in versions if name else versions[-1:]:
            pointing = ", ".join(alias for alias, number in aliases.items() if number == version.version)
            family = version.manifest.compatibility.family or "?"
            created = f"{version.created:%Y-%m-%d %H:%M}"
            table.add_row(version.ref, version.manifest.kind, family, version.status, pointing, created)
    Console().print(table if found else "Nothing is published yet.")


@app.command()
def show(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Show what a version is: status, files, compatibility, provenance."""
    with _open(home) as registry:
        version = registry.find(ref)
        aliases = registry.aliases(version.name)
    if as_json:
        _print_json(_entry(version, aliases) | {"manifest": _manifest(version)})
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
        "trigger words": ", ".join(manifest.trigger_words),
        "licence": manifest.license,
        "description": manifest.description,
        "defaults": manifest.defaults and manifest.defaults.model_dump_json(),
        "sampling": manifest.sampling and manifest.sampling.model_dump_json(),
        "metrics": manifest.metrics and json.dumps(manifest.metrics),
        "provenance": manifest.provenance and json.dumps(manifest.provenance),
        "files": "\n".join(f"{blob.size:>12,}  {name}" for name, blob in manifest.files.items()),
    }
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        if value:
            table.add_row(f"[bold]{key}[/bold]", escape(str(value)))
    Console().print(table)


@app.command()
def resolve(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Print the version that a reference means now. A quarantined one is refused."""
    with _open(home) as registry:
        version = registry.resolve(ref)
    _say(version, as_json, f"{version.ref} {version.digest}")
    _note(version)


@app.command()
def pull(
    ref: Ref,
    out: Annotated[Path, typer.Option("-o", "--out", help="A new or empty folder.", metavar="DIR")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write the files of a version into a folder, checked on the way."""
    with _open(home) as registry:
        version = registry.pull(ref, out)
    _say(version, as_json, f"{version.ref}: {len(version.manifest.files)} files in {out}")
    _note(version)


@app.command()
def alias(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ns/name")],
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS", help="e.g. prod")],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="e.g. 7")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make ns/name@ALIAS mean this version from now on."""
    with _open(home) as registry:
        target = registry.alias(name, alias_name, parse_version(version))
    _say(target, as_json, f"{name}@{alias_name} is now {target.ref}")


@app.command()
def approve(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Let a version be used; the highest approved one is what a bare ns/name means."""
    _set_status(ref, Status.APPROVED, home, as_json)


@app.command()
def deprecate(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Advise against a version. It still resolves, and says so."""
    _set_status(ref, Status.DEPRECATED, home, as_json)


@app.command()
def quarantine(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Forbid a version: nothing resolves to it until it is approved again."""
    _set_status(ref, Status.QUARANTINED, home, as_json)


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="Only this version.", metavar="[REF]")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Hash all stored files again and compare. Damage exits with 5 and lists what is damaged."""
    with _open(home) as registry:
        done = registry.verify(ref)
    if as_json:
        _print_json({"versions": done.versions, "blobs": done.blobs, "bytes": done.bytes, "damaged": []})
    else:
        typer.echo(f"{done.versions} versions, {done.blobs} blobs, {done.bytes:,} bytes: all as published")


def _open(home: Path | None, *, create: bool = False) -> Registry:
    return Registry.open(home or default_home(), create=create)


def _read_sampling(text: str) -> Any:
    """JSON, or the name of a file with JSON. Raises InvalidRequest, NotFound."""
    try:
        return json.loads(text if text.lstrip().startswith("{") else Path(text).read_bytes())
    except OSError as error:
        raise NotFound(f"--sampling: {text!r} is neither JSON nor a file that can be read") from error
    except ValueError as error:
        raise InvalidRequest(f"--sampling is not JSON: {error}", field="sampling") from error


def _set_status(ref: str, status: Status, home: Path | None, as_json: bool) -> None:
    with _open(home) as registry:
        version = registry.set_status(ref, status)
    _say(version, as_json, f"{version.ref} is now {version.status}")


def _say(version: Version, as_json: bool, text: str) -> None:
    if as_json:
        _print_json(_entry(version))
        return
    typer.echo(text)


def _note(version: Version) -> None:
    if version.notice:
        typer.echo(f"note: {version.notice}", err=True)


def _entry(version: Version, aliases: dict[str, int] | None = None) -> dict[str, Any]:
    entry = {
        "ref": version.ref,
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "status": version.status.value,
        "notice": version.notice,
        "kind": version.manifest.kind,
        "created": version.created.isoformat(),
    }
    if aliases is not None:
        entry["aliases"] = [alias for alias, number in aliases.items() if number == version.version]
    return entry


def _manifest(version: Version) -> Any:
    return json.loads(version.manifest.canonical())


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
