"""Progress of a run on stderr: bars on a terminal, a line now and then without one, nothing for a program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scumble_trainers.processes import is_first_process

EVERY = 10.0
"""Seconds between two lines of one stage."""


class ProgressReport(Protocol):
    """Called when `done` of `of` steps of `stage` are finished; `note` is printed beside it."""

    def __call__(self, stage: str, done: int, of: int, note: str = "") -> None: ...


def silent(stage: str, done: int, of: int, note: str = "") -> None:
    """Report nothing."""


@contextmanager
def progress(*, wanted: bool = True) -> Iterator[ProgressReport]:
    """Yield what reports on stderr: bars on a terminal, lines without one; silent if not `wanted`, and in all
    processes of a run but the first.
    """
    if not (wanted and is_first_process()):
        yield silent
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield ProgressLines(lambda line: print(line, file=sys.stderr, flush=True))


@contextmanager
def _bars() -> Iterator[ProgressReport]:
    """Yield a report with one bar per stage."""
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


@dataclass(slots=True)
class _Stage:
    """When a stage was first and last told of, and how much of it was done at first."""

    since: float
    done: int
    told: float


@dataclass(slots=True)
class ProgressLines:
    """Prints a line when a stage begins, every EVERY seconds, and when it is done."""

    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _stages: dict[str, _Stage] = field(default_factory=dict)

    def __call__(self, stage: str, done: int, of: int, note: str = "") -> None:
        now, known = self.clock(), self._stages.get(stage)
        if known is None:
            self._stages[stage] = _Stage(now, done, now)
        elif now - known.told < EVERY and done < of:
            return
        else:
            known.told = now
        parts = [f"{stage}: {done}/{of} ({done / of:.0%})", note, self._left(stage, done, of, now)]
        self.write(", ".join(part for part in parts if part))

    def _left(self, stage: str, done: int, of: int, now: float) -> str:
        """Return the time left, by the pace since the stage was first told of."""
        began = self._stages[stage]
        if done == of or done <= began.done:
            return ""
        return f"{_minutes((now - began.since) / (done - began.done) * (of - done))} left"


def _minutes(seconds: float) -> str:
    """Format a duration.

    >>> _minutes(9.7), _minutes(3700)
    ('0:10', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
