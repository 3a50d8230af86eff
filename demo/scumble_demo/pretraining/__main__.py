"""Entry point of every worker of a training run: `python -m scumble_demo.pretraining …`."""

from __future__ import annotations

import typer

from scumble_demo.pretraining.command import train_base

typer.run(train_base)
