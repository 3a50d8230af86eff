"""Runs the demo: publish, serve, send all requests at once, write the grid and the report."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from scumble.client import Client
from scumble.files import write_whole
from scumble.images import Images
from scumble.receipt import receipt_digest
from scumble.stats import Stats
from scumble_demo.grid.grid import draw_grid
from scumble_demo.grid.plan import GridColumn, GridPlan, GridRow, Publish
from scumble_registry import Registry, Version
from scumble_registry.results import RESULT, publish_result
from scumble_server.config import ServerConfig
from scumble_server.triton.running import running_server

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Drawn:
    """All images, `images[row][column]`, the loop's counters, and the seconds from the first request to
    the last image.
    """

    images: list[list[Images]]
    stats: Stats
    seconds: float


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the grid, the pictures and their receipts.")] = Path("demo/out"),
    demo_dir: Annotated[Path, typer.Option(help="Folder with demo.toml, base and adapters.")] = REPOSITORY / "demo",
    home: Annotated[Path | None, typer.Option(help="SCUMBLE_HOME to use. [default: a temporary one]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Draw images with different adapters in one batch, with a new registry and server, and write a grid."""

    def tell(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    plan = GridPlan.read(demo_dir)
    with _home(home) as fresh_home:
        tell(f"Publishing {1 + len(plan.publish)} entries into a registry under {fresh_home} …")
        versions = publish(plan, fresh_home)
        tell("Starting Triton …")
        with running_server(ServerConfig(home=fresh_home, base=plan.base.name)) as server:
            tell(f"Sending {len(plan.rows) * len(plan.columns)} requests at once to {server.grpc_url} …")
            drawn = draw(plan, server.grpc_url)
        tell("Triton has stopped.")
    report = write(plan, versions, drawn, out)
    print(json.dumps(report) if as_json else _describe(report))


@contextmanager
def _home(home: Path | None) -> Iterator[Path]:
    if home is not None:
        yield home.expanduser().resolve()
        return
    with tempfile.TemporaryDirectory(prefix="scumble-demo-") as folder:
        yield Path(folder)


def publish(plan: GridPlan, home: Path) -> list[Version]:
    """Publish the base, then the adapters for it."""
    with Registry.open(home, create=True) as registry:
        base = registry.publish(plan.base.path, plan.base.name, license=plan.base.license)
        return [base, *(_publish(registry, entry, plan.base.name) for entry in plan.publish)]


def _publish(registry: Registry, part: Publish, base: str) -> Version:
    """Publish an entry, with provenance and metrics if its folder is a trainer's result."""
    if (part.path / RESULT).is_file():
        return publish_result(registry, part.path, part.name, base=base)
    return registry.publish(
        part.path,
        part.name,
        base=base,
        image_encoder=part.image_encoder,
        license=part.license,
        trigger_words=part.trigger_words,
    )


def draw(plan: GridPlan, url: str) -> Drawn:
    """Draw every row in every column, one request each, all sent at once."""
    requests = [[column.request(row) for column in plan.columns] for row in plan.rows]
    with Client(url) as client, ThreadPoolExecutor(len(plan.rows) * len(plan.columns)) as threads:
        start = time.perf_counter()
        running = [[threads.submit(client.images.generate, request) for request in row] for row in requests]
        images = [[future.result() for future in row] for row in running]
        return Drawn(images, seconds=time.perf_counter() - start, stats=client.stats())


def write(plan: GridPlan, versions: list[Version], drawn: Drawn, out: Path) -> dict[str, Any]:
    """Write `grid.png`, a PNG and a receipt for each image, and `report.json`; returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = [[images.pil()[0] for images in row] for row in drawn.images]
    insets = [[column.inset(row) for column in plan.columns] for row in plan.rows]
    labels = [column.label for column in plan.columns]
    draw_grid(pictures, labels, [_row_label(row) for row in plan.rows], insets).save(out / "grid.png", optimize=True)
    cells = [
        _write_cell(images, out, row, column)
        for row, drawn_row in zip(plan.rows, drawn.images, strict=True)
        for column, images in zip(plan.columns, drawn_row, strict=True)
    ]
    report = {
        "grid": str(out / "grid.png"),
        "pictures": len(cells),
        "seconds": round(drawn.seconds, 3),
        "pictures_per_second": round(len(cells) / drawn.seconds, 3),
        "loop": drawn.stats.to_json(),
        "versions": [{"ref": version.ref, "digest": version.digest} for version in versions],
        "requests": cells,
    }
    write_whole(out / "report.json", json.dumps(report, indent=2).encode())
    return report


def _write_cell(images: Images, out: Path, row: GridRow, column: GridColumn) -> dict[str, Any]:
    name = f"{_slug(row.text)}.{_slug(column.label)}"
    (picture,) = images.save(out / f"{name}.png")
    write_whole(out / f"{name}.json", json.dumps(images.receipt.to_json(), indent=2).encode())
    request = images.receipt.request
    return {
        "file": str(picture),
        "prompt": request.prompt,
        "adapters": {bound.ref: bound.weight for bound in images.receipt.adapters},
        "seed": request.seed,
        "steps": request.steps,
        "scheduler": request.scheduler,
        "receipt": receipt_digest(images.receipt),
    }


def _row_label(row: GridRow) -> tuple[str, str]:
    weight = f"\nweights times {row.weight:g}" if row.weight != 1 else ""
    style = f"{row.style}\n" if row.style else ""
    return row.text, f"{style}{row.scheduler}, {row.steps} steps\nseed {row.seed}{weight}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _describe(report: dict[str, Any]) -> str:
    loop = report["loop"]
    sizes = ", ".join(f"{count} of {size}" for size, count in loop["batch_sizes"].items())
    return "\n".join(
        [
            "Receipts:",
            *(f"  {cell['receipt'][:23]}…  {cell['file']}" for cell in report["requests"]),
            "Bound from the registry:",
            *(f"  {version['ref']:24} {version['digest']}" for version in report["versions"]),
            f"Steps by images in the batch: {sizes}.",
            f"Different adapters shared a step in {loop['mixed_steps']} of {loop['steps']} steps.",
            f"{report['pictures']} pictures in {report['seconds']:.1f} s, {report['pictures_per_second']:.2f}/s.",
            f"Grid: {report['grid']}",
        ]
    )
