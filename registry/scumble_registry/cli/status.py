"""`alias`, `approve`, `deprecate` and `quarantine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scumble_registry.cli.options import Home, Json, Ref, open_registry
from scumble_registry.cli.printing import print_version
from scumble_registry.references import parse_version
from scumble_registry.store.catalogue import Status

app = typer.Typer()


@app.command()
def alias(
    name: Annotated[str, typer.Argument(metavar="NAME", help="ns/name")],
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS", help="e.g. prod")],
    version: Annotated[str, typer.Argument(metavar="VERSION", help="e.g. 7")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point ns/name@ALIAS at this version."""
    with open_registry(home) as registry:
        target = registry.alias(name, alias_name, parse_version(version))
    print_version(target, as_json, f"{name}@{alias_name} is now {target.ref}")


@app.command()
def approve(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Approve a version. A bare ns/name resolves to the highest approved one."""
    _set_status(ref, Status.APPROVED, home, as_json)


@app.command()
def deprecate(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Deprecate a version. It still resolves, with a notice."""
    _set_status(ref, Status.DEPRECATED, home, as_json)


@app.command()
def quarantine(ref: Ref, home: Home = None, as_json: Json = False) -> None:
    """Quarantine a version: nothing resolves to it until it is approved again. Names the aliases that point at it."""
    _set_status(ref, Status.QUARANTINED, home, as_json)


def _set_status(ref: str, status: Status, home: Path | None, as_json: bool) -> None:
    with open_registry(home) as registry:
        version = registry.set_status(ref, status)
        aliases = registry.aliases(version.name)
    print_version(version, as_json, f"{version.ref} is now {version.status}", aliases)
    pointing = [f"{version.name}@{alias_name}" for alias_name, number in aliases.items() if number == version.version]
    if status is Status.QUARANTINED and pointing:
        typer.echo(
            f"warning: {' and '.join(pointing)} point{'s' if len(pointing) == 1 else ''} at {version.ref}, so requests "
            f"for it are refused; `scumble registry alias {version.name} {pointing[0].partition('@')[2]} N` points it "
            "at another version",
            err=True,
        )
