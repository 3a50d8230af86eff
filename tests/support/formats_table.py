"""What the oracle tests of formats found, as the table in `docs/formats.md`.

A test that compares a format's latents with an oracle's is marked `oracle` and calls `note`. `make formats-table` runs
them with SCUMBLE_FORMATS_NOTES naming a file, one JSON line a note, and renders that file.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "SCUMBLE_FORMATS_NOTES"
TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
BEGIN, END = "<!-- formats-table: begin -->", "<!-- formats-table: end -->"


@dataclass(frozen=True, slots=True)
class Note:
    format: str
    """As people call it: `LoHa, LyCORIS`."""
    family: str
    """`sd1`, `sd2`, `sdxl`."""
    oracle: str
    """Whose word it is compared with: `diffusers`, `LyCORIS`, `merged by the formula`."""
    error: float
    """Largest absolute difference of the final latents to the oracle's."""
    distance: float
    """Largest absolute difference of the oracle's latents to the plain picture's."""


def note(format: str, family: str, oracle: str, error: float, distance: float) -> None:  # noqa: A002 - the column's name
    """Hold a result to the law (error ≤ 1e-3, distance ≥ 50 times that), and note it if somebody makes the table."""
    assert error <= TOLERANCE, f"{format} on {family}: latents are {error} from {oracle}"
    assert distance >= VISIBLE, f"{format} on {family}: {oracle} is only {distance} from the plain picture"
    if file := os.environ.get(VARIABLE):
        found = Note(format, family, oracle, float(error), float(distance))
        with Path(file).open("a") as notes:
            notes.write(json.dumps(asdict(found)) + "\n")


def table(notes: list[Note]) -> str:
    """Markdown, sorted; of several notes on one row the worst of each number."""
    rows: dict[tuple[str, str, str], tuple[float, float]] = {}
    for each in notes:
        key = each.format, each.family, each.oracle
        error, distance = rows.get(key, (0.0, float("inf")))
        rows[key] = max(error, each.error), min(distance, each.distance)
    lines = [
        "| format | family | oracle | largest latent error | distance from the plain picture |",
        "|---|---|---|---|---|",
    ]
    for key, (error, distance) in sorted(rows.items(), key=lambda row: (row[0][0].casefold(), *row[0][1:])):
        lines.append(f"| {' | '.join(key)} | {error:.0e} | {distance:.2g} |")
    return "\n".join(lines)


def render(notes: Path, page: Path) -> None:
    """Put the table of `notes` between the page's two markers."""
    found = [Note(**json.loads(line)) for line in notes.read_text().splitlines()]
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


if __name__ == "__main__":
    render(Path(sys.argv[1]), Path(sys.argv[2]))
