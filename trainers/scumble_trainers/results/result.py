"""The result of a finished run: the adapter's file and its manifest's data, ready to publish.

OUT/<the adapter's file or files>
OUT/training.json       trigger words, license, provenance, metrics
OUT/sample_grid.png
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scumble.files import write_whole
from scumble_registry import Registry, Version
from scumble_registry.formats import dreambooth

CARD = "training.json"
GRID = "sample_grid.png"


@dataclass(frozen=True, slots=True)
class Result:
    """The content of training.json. `adapter` is a file name inside OUT."""

    adapter: str
    license: str | None
    description: str
    trigger_words: tuple[str, ...]
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]


def write_result(out: Path, result: Result) -> None:
    """Write training.json atomically. It is written last: if it exists, the run is finished."""
    write_whole(out / CARD, (json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n").encode())


def read_result(out: Path) -> Result | None:
    """Read the result of a finished run, or return None."""
    file = out / CARD
    if not file.is_file():
        return None
    content = json.loads(file.read_text("utf-8"))
    return Result(**{**content, "trigger_words": tuple(content["trigger_words"])})


def publish_result(
    registry: Registry,
    out: Path,
    name: str,
    *,
    base: str | None,
    alias: str | None = None,
    staged: bool = False,
) -> Version:
    """Publish the result in `out` as the next version of `name`; the same result again is the same version."""
    result = read_result(out)
    if result is None:
        raise FileNotFoundError(out / CARD)
    grid = out / GRID
    with _whole(registry, out / result.adapter, base) as adapter:
        return registry.publish(
            adapter,
            name=name,
            base=base,
            alias=alias,
            license=result.license,
            staged=staged,
            trigger_words=result.trigger_words,
            provenance=dict(result.provenance),
            metrics=dict(result.metrics),
            sample_grid=grid if grid.is_file() else None,
            description=result.description,
        )


@contextmanager
def _whole(registry: Registry, adapter: Path, base: str | None) -> Iterator[Path]:
    """Yield `adapter`, or for a difference to the base (`--save-delta`) the whole checkpoint's folder."""
    if base is None or not dreambooth.is_difference(adapter):
        yield adapter
        return
    with tempfile.TemporaryDirectory(prefix="scumble-whole-") as temporary:
        whole = Path(temporary) / adapter.name
        dreambooth.restore(adapter, registry.materialise(registry.resolve(base)), whole)
        yield whole
