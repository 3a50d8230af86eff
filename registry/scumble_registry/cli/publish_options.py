"""The options that `publish` and `import` share: each field is one option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from scumble_registry.cli.options import (
    Alias,
    AllowLeftover,
    Averaged,
    BaseRef,
    Description,
    ImageEncoder,
    License,
    Like,
    MaxSize,
    Prediction,
    PublishedName,
    SampleGrid,
    SamplingText,
    Shortcut,
    Staged,
    Trigger,
    read_sampling,
    read_size,
)
from scumble_registry.formats.source import Hints
from scumble_registry.registry import Registry


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """Values of the options, as typed."""

    name: PublishedName
    base: BaseRef = None
    image_encoder: ImageEncoder = None
    alias: Alias = None
    license_id: License = None
    staged: Staged = False
    trigger: Trigger = None
    description: Description = ""
    sample_grid: SampleGrid = None
    sampling: SamplingText = None
    allow_leftover: AllowLeftover = False
    max_size: MaxSize = None
    like: Like = None
    prediction: Prediction = None
    averaged: Averaged = False
    shortcut: Shortcut = None

    def arguments(self, registry: Registry) -> dict[str, Any]:
        """Return the keyword arguments of `Registry.publish`. Raises InvalidRequest, NotFound, Refused."""
        return {
            "name": self.name,
            "base": self.base,
            "image_encoder": self.image_encoder,
            "alias": self.alias,
            "license": self.license_id,
            "staged": self.staged,
            "trigger_words": self.trigger or (),
            "description": self.description,
            "sample_grid": self.sample_grid,
            "sampling": read_sampling(self.sampling),
            "allow_leftover": self.allow_leftover,
            "max_bytes": read_size(self.max_size),
            "hints": Hints(registry.folder_of(self.like), self.prediction, self.averaged, self.shortcut),
        }


def with_publish_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `options: PublishOptions` one typer option for each field."""

    def expanded(**given: Any) -> None:
        options = PublishOptions(**{field.name: given.pop(field.name) for field in fields(PublishOptions)})
        command(options=options, **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.annotation is PublishOptions:
            parameters += _parameters()
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    return expanded


def _parameters() -> list[inspect.Parameter]:
    types = get_type_hints(PublishOptions, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        for field in fields(PublishOptions)
    ]
