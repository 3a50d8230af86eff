"""The demo's plan, read from `demo.toml` beside its base and adapters.

[base]       name, path, license
[[publish]]  name, path, license, trigger_words, image_encoder: the adapters to publish, in this order
[[row]]      text, style, seed, steps, scheduler, guidance_scale (the base's), weight = 1.0 (times every adapter's),
                          images: reference pictures by name
[[column]]   label, prompt = "{text}, {style}", adapters as in a request, shows: the row's picture to draw in a corner
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.errors import InvalidRequest, NotFound
from scumble.request import Adapter, Request, SchedulerName

PLAN = "demo.toml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Publish(_Part):
    """An entry to publish. A trainer's result has more data in its training.json."""

    name: str
    path: Path
    license: str | None = None
    trigger_words: tuple[str, ...] = ()
    image_encoder: str | None = None


class GridRow(_Part):
    """The request that every column draws with its own adapters."""

    text: str
    style: str = ""
    seed: int
    steps: int
    scheduler: SchedulerName
    guidance_scale: float | None = None
    weight: float = 1.0
    images: dict[str, Path] = Field(default_factory=dict)


class GridColumn(_Part):
    """The adapters that every row is drawn with."""

    label: str
    prompt: str = "{text}, {style}"
    adapters: tuple[Adapter, ...] = ()
    shows: str | None = None

    def request(self, row: GridRow) -> Request:
        """Return the request of a row and a column, with the row's pictures that the adapters need."""
        adapters = [adapter.model_copy(update={"weight": adapter.weight * row.weight}) for adapter in self.adapters]
        wanted = {name for adapter in self.adapters for name in adapter.images}
        return Request(
            prompt=self.prompt.format(text=row.text, style=row.style),
            seed=row.seed,
            steps=row.steps,
            scheduler=row.scheduler,
            guidance_scale=row.guidance_scale,
            adapters=tuple(adapters),
            images={name: row.images[name].read_bytes() for name in sorted(wanted)},
        )

    def inset(self, row: GridRow) -> Path | None:
        return row.images[self.shows] if self.shows else None


class GridPlan(_Part):
    base: Publish
    publish: tuple[Publish, ...] = ()
    rows: tuple[GridRow, ...] = Field(alias="row", min_length=1)
    columns: tuple[GridColumn, ...] = Field(alias="column", min_length=1)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a plan; paths become absolute. Raises NotFound for a missing file, InvalidRequest for an
        invalid plan.
        """
        file = folder / PLAN
        if not file.is_file():
            raise NotFound(
                f"the demo's files are not at {folder}; run it in a clone of the repository, or pass --demo-dir",
                path=str(file),
            )
        try:
            plan = cls.model_validate(tomllib.loads(file.read_text("utf-8")))
        except (ValidationError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(f"{file} is not a valid plan of the demo: {error}", field=str(file)) from error
        _check_pictures(plan, file)
        return plan.model_copy(
            update={
                "base": _located(plan.base, folder),
                "publish": tuple(_located(entry, folder) for entry in plan.publish),
                "rows": tuple(_with_pictures(row, folder) for row in plan.rows),
            }
        )


def _check_pictures(plan: GridPlan, file: Path) -> None:
    """Check that every row has the pictures that the columns need. Raises InvalidRequest."""
    wanted = {name for column in plan.columns for adapter in column.adapters for name in adapter.images}
    wanted |= {column.shows for column in plan.columns if column.shows}
    for row in plan.rows:
        if missing := sorted(wanted - row.images.keys()):
            raise InvalidRequest(f"{file}: row {row.text!r} has no picture {missing[0]!r}", field=str(file))


def _located(part: Publish, folder: Path) -> Publish:
    return part.model_copy(update={"path": _there(folder / part.path, part.name)})


def _with_pictures(row: GridRow, folder: Path) -> GridRow:
    return row.model_copy(update={"images": {name: _there(folder / path, name) for name, path in row.images.items()}})


def _there(path: Path, name: str) -> Path:
    if not path.exists():
        raise NotFound(f"{path} is missing; the demo needs it as {name}", path=str(path))
    return path
