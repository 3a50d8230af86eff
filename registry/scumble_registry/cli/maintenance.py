"""`gc`, `fsck` and `verify`: remove unneeded files, and check the stored ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from scumble.errors import IntegrityError
from scumble_registry.cli.options import Home, Json, open_registry
from scumble_registry.cli.printing import print_json

app = typer.Typer()


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be removed.")] = False,
    grace: Annotated[float, typer.Option(min=0, help="Hours without use after which a file may be removed.")] = 24.0,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Remove blobs that no version needs and unused cache entries. Safe while other processes use the registry."""
    with open_registry(home) as registry:
        done = registry.collect(grace=grace * 3600, dry_run=dry_run)
    for row in done.unreadable:
        typer.echo(f"note: {row.ref} cannot be read, so no blob was removed: {row.reason}", err=True)
    if as_json:
        print_json(asdict(done) | {"dry_run": dry_run})
        return
    cached = "the cache was left alone (in use)" if done.cached is None else f"{done.cached} entries of the cache"
    what = f"{done.blobs} blobs, {cached}, {done.unfinished} unfinished: {done.bytes:,} bytes"
    typer.echo(f"{what} would be freed" if dry_run else f"{what} freed")


@app.command()
def fsck(home: Home = None, as_json: Json = False) -> None:
    """Check that database, manifests and files agree, without hashing. Exits with 5 if they do not."""
    with open_registry(home) as registry:
        checked = registry.check()
    if checked.problems:
        raise IntegrityError("; ".join(checked.problems), damaged=list(checked.problems))
    if as_json:
        print_json(asdict(checked))
    else:
        more = f"; {checked.unneeded} unneeded blobs (`gc` removes them)" if checked.unneeded else ""
        typer.echo(f"{checked.versions} versions, {checked.blobs} blobs: complete{more}")


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="Only this version.", metavar="[REF]")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Hash all stored files again and compare. Exits with 5 if any is damaged, and lists them."""
    with open_registry(home) as registry:
        done = registry.verify(ref)
    if as_json:
        print_json({"versions": done.versions, "blobs": done.blobs, "bytes": done.bytes, "damaged": []})
    else:
        typer.echo(f"{done.versions} versions, {done.blobs} blobs, {done.bytes:,} bytes: all as published")
