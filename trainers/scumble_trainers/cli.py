"""`scumble train …`: one subcommand per method, and the base's own pretraining."""

from __future__ import annotations

import typer

from scumble_trainers.base.command import train_base
from scumble_trainers.command import method_command
from scumble_trainers.emoji.command import prepare_style
from scumble_trainers.methods import METHODS

app = typer.Typer(no_args_is_help=True, help="Train an adapter (or the demo base) and publish it.")
app.command("base")(train_base)
app.command("emoji")(prepare_style)
for entry in METHODS:
    app.command(entry.command)(method_command(entry))
