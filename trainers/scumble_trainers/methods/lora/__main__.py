"""`python -m scumble_trainers.methods.lora`: the same command, for launchers that start modules."""

from __future__ import annotations

import typer

from scumble_trainers.methods.lora.command import train_lora

typer.run(train_lora)
