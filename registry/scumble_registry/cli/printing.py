"""The commands' output: one JSON document for programs, lines and tables for people.

Text from a file is untrusted: `plain` makes it printable and short. Tables are as wide as their content, on a terminal
and in a pipe, as people copy references, digests and names out of them: a cell is never cut or broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.cells import cell_len

from scumble_registry.store.catalogue import Version

_MOST = 400


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_version(version: Version, as_json: bool, text: str, aliases: dict[str, int] | None = None) -> None:
    if as_json:
        print_json(entry(version, aliases))
        return
    typer.echo(text)


def note(version: Version) -> None:
    if version.notice:
        typer.echo(f"note: {version.notice}", err=True)


def entry(version: Version, aliases: dict[str, int] | None = None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "ref": version.ref,
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "status": version.status.value,
        "notice": version.notice,
        "kind": version.manifest.kind,
        "created": version.created.isoformat(),
    }
    if aliases is not None:
        fields["aliases"] = [alias for alias, number in aliases.items() if number == version.version]
    return fields


def print_rows(rows: Mapping[str, object]) -> None:
    """Print two columns; empty values are left out."""
    said = {key: str(value) for key, value in rows.items() if value}
    width = max((cell_len(key) for key in said), default=0)
    for key, value in said.items():
        first, *more = value.split("\n")
        typer.echo(f" {typer.style(_padded(key, width), bold=True)}  {first}")
        for line in more:
            typer.echo(f" {'':{width}}  {line}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of single lines under the columns' names."""
    rows = list(rows)
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    for number, cells in enumerate([columns, *rows]):
        line = "  ".join(map(_padded, cells, widths)).rstrip()
        typer.echo(f" {typer.style(line, bold=True) if number == 0 else line}")


def _padded(text: str, width: int) -> str:
    """Pad to a width in a terminal's cells, of which some characters take two."""
    return text + " " * (width - cell_len(text))


def plain(text: object, most: int = _MOST) -> str:
    r"""Return the text on one line, without control characters, and cut.

    >>> plain("ink\x1b[2J")
    'ink�[2J'
    """
    line = "".join(character if character.isprintable() else "�" for character in " ".join(str(text).split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def listed(words: Any, most: int = 8) -> str:
    """Return the words separated by commas, and cut.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    words = [plain(word, 80) for word in words]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
