"""The `scumble` command. Packages register subcommands as entry points; only the one that runs is imported."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated

import typer

from scumble.errors import ScumbleError, Unavailable

GROUP = "scumble.commands"
INTERRUPTED = 130

HELP = {
    "build": "Export a base's graphs for other runtimes.",
    "demo": "Generate images with different adapters in one batch, with everything included.",
    "generate": "Generate images.",
    "registry": "Publish, find and check adapters and bases.",
    "serve": "Start the server and keep it running.",
    "train": "Train an adapter and publish it.",
}
EXTRAS = {
    "scumble_build": "build",
    "scumble_demo": "demo",
    "scumble_registry": "registry",
    "scumble_server": "server",
    "scumble_trainers": "trainers",
}


def main() -> None:
    """Run the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status. The option parser may raise SystemExit."""
    command = _command_of(arguments or _words_to_complete(os.environ))
    try:
        build_app(command)(args=arguments, prog_name="scumble")
    except ScumbleError as error:
        return _report(error, as_json="--json" in arguments)
    except ModuleNotFoundError as error:
        return _report(_explain_missing(command, error), as_json="--json" in arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _command_of(arguments: list[str]) -> str | None:
    """Return the first argument that is no option."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _words_to_complete(environment: Mapping[str, str]) -> list[str]:
    """Return the words behind `scumble` that a shell asks to complete: it passes them by the environment alone."""
    if "_SCUMBLE_COMPLETE" not in environment:
        return []
    words = environment.get("_TYPER_COMPLETE_ARGS") or environment.get("COMP_WORDS") or ""
    return words.split()[1:]


def build_app(command: str | None) -> typer.Typer:
    """Make the app with every command by name, and only `command` imported."""
    app = typer.Typer(callback=_options, no_args_is_help=True, pretty_exceptions_enable=False)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name == command:
            _add(app, entry)
        else:
            app.command(entry.name, help=HELP.get(entry.name))(_not_loaded)
    return app


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    loaded = entry.load()
    if isinstance(loaded, typer.Typer):
        app.add_typer(loaded, name=entry.name, help=HELP.get(entry.name))
    else:
        app.command(entry.name)(loaded)


def _not_loaded() -> None:
    """Do nothing: a placeholder for a command that `--help` lists."""


def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda value: _print_version(asked=value))
    ] = False,
) -> None:
    """Serve diffusion models with any mix of adapters per request, from a registry of versions."""


def _print_version(*, asked: bool) -> None:
    if asked:
        print(f"scumble {version('scumble')}")
        raise typer.Exit


def _report(error: ScumbleError, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": error.to_dict()}, default=str))
    else:
        print(f"scumble: {error.message}", file=sys.stderr)
    return error.exit_status


def _explain_missing(command: str | None, error: ModuleNotFoundError) -> Unavailable:
    """Name the extra to install. Raises the error itself for a missing module of scumble, which is a bug."""
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == command]
    extra = EXTRAS.get(entries[0].module.partition(".")[0]) if entries else None
    if extra is None or not error.name or error.name.startswith("scumble"):
        raise error
    return Unavailable(
        f"`scumble {command}` needs {error.name}, which is not installed: pip install 'scumble[{extra}]'",
        extra=extra,
        missing=error.name,
    )
