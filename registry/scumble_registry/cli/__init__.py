"""`scumble registry …`: the registry's methods as commands. `--json` prints one JSON document for programs.

Errors are ScumbleErrors; the main command prints them and exits with their status.
"""

from __future__ import annotations

import typer

from scumble_registry.cli import importing, inspect, maintenance, publish, status, versions

app = typer.Typer(help="Publish, find and check adapters and bases.", no_args_is_help=True)
for part in (publish, importing, inspect, versions, status, maintenance):
    app.add_typer(part.app)
