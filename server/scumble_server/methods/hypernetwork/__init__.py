"""Hypernetworks, of two kinds: networks on attention's context, and predictors of a LoRA."""

from __future__ import annotations

from scumble_server.methods.hypernetwork.context_networks import *  # noqa: F403 - a facade
