"""The `scumble` command. Packages register their subcommands as entry points; none is imported until asked for."""

from __future__ import annotations

GROUP = "scumble.commands"

HELP = {
    "demo": "Make pictures with different adapters in one batch, from nothing.",
    "generate": "Make a picture.",
    "registry": "Publish, find and check adapters and bases.",
    "serve": "Start the server.",
    "train": "Train an adapter and publish it.",
}
