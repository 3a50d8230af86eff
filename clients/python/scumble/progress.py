"""A progress bar in a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scumble.events import Done, Queued, Step, StreamEvent


class ProgressBar:
    """A progress bar on stderr; with `quiet`, or without a terminal, nothing is shown."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("sent", total=None)

    def show(self, event: StreamEvent) -> None:
        match event:
            case Queued(position):
                self.say(f"queued, {position} ahead" if position else "next")
            case Step(step, steps):
                self._progress.update(self._task, description="drawing", completed=step, total=steps)
            case Done():
                self.say("done")

    def say(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def tell(self, what: str) -> None:
        """Print a line above the bar, with or without a terminal."""
        self._console.print(what, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
