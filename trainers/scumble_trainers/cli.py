"""`scumble train …`: one subcommand per method, and subcommands of other packages."""

from __future__ import annotations

from importlib.metadata import entry_points

import typer

from scumble_trainers.command import method_command
from scumble_trainers.methods import METHODS

GROUP = "scumble.train_commands"
"""Entry point for subcommands: functions that typer reads."""

app = typer.Typer(no_args_is_help=True, help="Train an adapter and publish it.")
for added in sorted(entry_points(group=GROUP), key=lambda added: added.name):
    app.command(added.name)(added.load())
for entry in METHODS:
    app.command(entry.command)(method_command(entry))
