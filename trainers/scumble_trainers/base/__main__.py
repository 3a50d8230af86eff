"""What every worker of a training run executes: `python -m scumble_trainers.base …`."""

from __future__ import annotations

import typer

from scumble_trainers.base.command import train_base

typer.run(train_base)
