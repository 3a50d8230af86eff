"""The commands' output: one JSON document for programs, lines and tables for people.

Text from a file is untrusted: `plain` makes it printable and short, and tables take it as Text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scumble_registry.store.catalogue import Version

_MOST = 400


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_version(version: Version, as_json: bool, text: str) -> None:
    if as_json:
        print_json(entry(version))
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
    table = Table(show_header=False, box=None)
    for key, value in rows.items():
        if value:
            table.add_row(Text(key, style="bold"), Text(str(value)))
    Console().print(table)


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
