"""Ctrl-C in the middle of a run: says where it stands, and the command that goes on from there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scumble_trainers.processes import is_first_process

FRESH = "--fresh"


@contextmanager
def explain_how_to_go_on(out: Path, arguments: Sequence[str]) -> Iterator[None]:
    """On KeyboardInterrupt, print on stderr how the run in `out` goes on, and raise it again."""
    try:
        yield
    except KeyboardInterrupt:
        if is_first_process():
            print(f"scumble: {how_to_go_on(out, arguments)}", file=sys.stderr)
        raise


def how_to_go_on(out: Path, arguments: Sequence[str]) -> str:
    """Return what is kept of the run in `out`, and the command that goes on, for the process's `arguments`."""
    steps = sorted(path.name for path in (out / "checkpoints").glob("step-*") if path.is_dir())
    command = resuming_command(arguments)
    if not steps:
        return f"interrupted before the first checkpoint (--checkpoint-every); to start again, run\n  {command}"
    step = int(steps[-1].removeprefix("step-"))
    return f"interrupted; step {step} is kept in {out}. To go on from there, run\n  {command}"


def resuming_command(arguments: Sequence[str]) -> str:
    """Return the same command for a shell, without `--fresh`, which would delete what it is to go on from.

    >>> resuming_command(["/usr/bin/scumble", "train", "lora", "--fresh", "--prompt", "a cat"])
    "scumble train lora --prompt 'a cat'"
    """
    program, *rest = arguments
    start = ["python", "-m", "scumble_trainers"] if Path(program).name == "__main__.py" else [Path(program).name]
    return shlex.join([*start, *(argument for argument in rest if argument != FRESH)])
