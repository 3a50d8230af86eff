"""Progress bars on a terminal, nothing for a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressReport(Protocol):
    """Called when `done` of `of` steps of `stage` are finished; `note` is printed beside the bar."""

    def __call__(self, stage: str, done: int, of: int, note: str = "") -> None: ...


def silent(stage: str, done: int, of: int, note: str = "") -> None:
    """Report nothing."""


@contextmanager
def progress_bars(*, wanted: bool = True) -> Iterator[ProgressReport]:
    """Yield a ProgressReport with one bar per stage on stderr, or a silent one if not `wanted` or not on a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield silent
        return
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        stages: dict[str, int] = {}

        def report(stage: str, done: int, of: int, note: str = "") -> None:
            if stage not in stages:
                stages[stage] = int(bars.add_task(stage, total=of, note=note))
            task = next(task for task in bars.tasks if int(task.id) == stages[stage])
            bars.update(task.id, completed=done, total=of, note=note)

        yield report
