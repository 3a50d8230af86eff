"""That what is kept is whole, and no more than that."""

from __future__ import annotations

from typing import Annotated

import typer

from scumble_registry.cli.options import Home, Json, open_registry
from scumble_registry.cli.printing import print_json

app = typer.Typer()


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="Only this version.", metavar="[REF]")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Hash all stored files again and compare. Damage exits with 5 and lists what is damaged."""
    with open_registry(home) as registry:
        done = registry.verify(ref)
    if as_json:
        print_json({"versions": done.versions, "blobs": done.blobs, "bytes": done.bytes, "damaged": []})
    else:
        typer.echo(f"{done.versions} versions, {done.blobs} blobs, {done.bytes:,} bytes: all as published")
