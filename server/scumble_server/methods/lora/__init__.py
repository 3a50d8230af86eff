"""LoRA and its whole family: factors that rows carry, and changes that are merged into weights."""

from __future__ import annotations

from scumble_server.methods.lora.factors import *  # noqa: F403 - a facade
