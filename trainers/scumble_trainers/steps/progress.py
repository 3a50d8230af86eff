"""A progress bar for a person at a terminal; silence for a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressReport(Protocol):
    """Says that `done` of `of` steps of `stage` are behind us; `note` is shown beside the bar."""

    def __call__(self, stage: str, done: int, of: int, note: str = "") -> None: ...


def silent(stage: str, done: int, of: int, note: str = "") -> None:
    """A ProgressReport that shows nothing."""


@contextmanager
def shown(*, wanted: bool = True) -> Iterator[ProgressReport]:
    """A ProgressReport with one bar per stage on stderr, where that is a terminal and it is `wanted`."""
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
