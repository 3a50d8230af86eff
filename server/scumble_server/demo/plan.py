"""What the demo shows, read from `demo.toml` beside its base and adapters.

[base]       name, path, style (words that end a prompt without adapters), license
[[adapter]]  name, path, label, style, license, weight = 1.0
[together]   weight: of each adapter in the column that has all of them
[[prompt]]   text, seed, steps, scheduler, guidance_scale (the base's), weight = 1.0 (times that of the adapters)
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.errors import InvalidRequest, NotFound
from scumble.request import Adapter, Request, SchedulerName

PLAN = "demo.toml"
PartT = TypeVar("PartT", "BasePart", "AdapterPart")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BasePart(_Part):
    name: str
    path: Path
    style: str = ""
    license: str | None = None


class AdapterPart(_Part):
    name: str
    path: Path
    label: str
    style: str = ""
    license: str | None = None
    weight: float = 1.0


class Together(_Part):
    weight: float = 1.0


class PromptPart(_Part):
    text: str
    seed: int
    steps: int
    scheduler: SchedulerName
    guidance_scale: float | None = None
    weight: float = 1.0


class Column(_Part):
    """One way to draw every prompt: with these adapters, or with none."""

    label: str
    style: str
    adapters: tuple[Adapter, ...] = ()

    def request(self, prompt: PromptPart) -> Request:
        adapters = [adapter.model_copy(update={"weight": adapter.weight * prompt.weight}) for adapter in self.adapters]
        return Request(
            prompt=f"{prompt.text}, {self.style}" if self.style else prompt.text,
            seed=prompt.seed,
            steps=prompt.steps,
            scheduler=prompt.scheduler,
            guidance_scale=prompt.guidance_scale,
            adapters=tuple(adapters),
        )


class Plan(_Part):
    base: BasePart
    adapters: tuple[AdapterPart, ...] = Field(alias="adapter", min_length=1)
    together: Together = Together()
    prompts: tuple[PromptPart, ...] = Field(alias="prompt", min_length=1)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Paths become absolute. Raises NotFound for a file that is missing, InvalidRequest for a bad plan."""
        file = folder / PLAN
        if not file.is_file():
            raise NotFound(
                f"the demo's files are not at {folder}; run it in a clone of the repository, or give --demo-dir",
                path=str(file),
            )
        try:
            plan = cls.model_validate(tomllib.loads(file.read_text()))
        except (ValidationError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(f"{file} is no plan of a demo: {error}", field=str(file)) from error
        return plan.model_copy(
            update={
                "base": _located(plan.base, folder),
                "adapters": tuple(_located(adapter, folder) for adapter in plan.adapters),
            }
        )

    def columns(self) -> tuple[Column, ...]:
        """The base, each adapter, and all adapters together."""
        single = [
            Column(
                label=_label(part, part.weight),
                style=part.style,
                adapters=(Adapter(ref=part.name, weight=part.weight),),
            )
            for part in self.adapters
        ]
        weight = self.together.weight
        every = Column(
            label=" + ".join(_label(part, weight) for part in self.adapters),
            style=", ".join(part.style for part in self.adapters if part.style),
            adapters=tuple(Adapter(ref=part.name, weight=weight) for part in self.adapters),
        )
        return (Column(label="base alone", style=self.base.style), *single, *([every] if len(single) > 1 else []))


def _label(part: AdapterPart, weight: float) -> str:
    return f"{part.label} {weight:g}"


def _located(part: PartT, folder: Path) -> PartT:
    path = folder / part.path
    if not path.exists():
        raise NotFound(f"{path} is missing; the demo needs it as {part.name}", path=str(path))
    return part.model_copy(update={"path": path})
