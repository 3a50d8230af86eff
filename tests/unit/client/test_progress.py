"""The bar is for people at a terminal; programs and quiet ones see nothing."""

from __future__ import annotations

import io

from rich.console import Console

from scumble.events import Queued, Step
from scumble.progress import ProgressBar


def shown(*, terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    with ProgressBar(quiet=quiet, console=Console(file=out, force_terminal=terminal, width=80)) as bar:
        for event in (Queued(2), Queued(0), Step(3, 8)):
            bar.show(event)
            bar._progress.refresh()
    return out.getvalue()


def test_a_terminal_shows_how_far_it_is() -> None:
    text = shown(terminal=True)
    assert "queued, 2 ahead" in text
    assert "next" in text
    assert "3/8" in text


def test_elsewhere_nothing_is_written() -> None:
    assert shown(terminal=False).strip() == ""
    assert shown(terminal=True, quiet=True).strip() == ""
