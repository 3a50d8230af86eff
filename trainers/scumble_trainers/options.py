"""Builds a method's command line from its settings: one option per field."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from scumble.errors import InvalidRequest
from scumble_trainers.settings import DATA, SAVE, TrainSettings, option_name

Common = Mapping[str, Any]
"""Options of every method besides its settings, by the names in COMMON."""

Command = Callable[[Common, dict[str, Any]], None]
"""Called with the common options and the settings that were given."""


def _option(*names: str, panel: str, help: str) -> Any:  # noqa: A002, typer's word
    return typer.Option(*names, rich_help_panel=panel, help=help)


COMMON: Mapping[str, tuple[Any, Any]] = {
    "base": (str, _option("--base", panel=DATA, help="Base: a diffusers folder, or a reference: ns/name, ns/name@7.")),
    "data": (Path, _option("--data", panel=DATA, help="Folder with pictures and metadata.jsonl, or such a file.")),
    "config": (Path | None, _option("--config", panel=DATA, help="TOML file of options; the command line wins.")),
    "publish": (str | None, _option("--publish", panel=SAVE, help="Publish as ns/name.")),
    "alias": (str | None, _option("--alias", panel=SAVE, help="Point this alias at it.")),
    "staged": (bool, _option("--staged", panel=SAVE, help="Publish without approval.")),
    "out": (Path | None, _option("--out", panel=SAVE, help="Checkpoints, samples, logs and the result.")),
    "fresh": (bool, _option("--fresh", panel=SAVE, help="Delete an earlier run in --out first.")),
    "evaluate": (
        bool,
        _option("--evaluate", panel=SAVE, help="Measure the effect on held-out data and store it."),
    ),
    "as_json": (bool, _option("--json", panel=SAVE, help="Print the result as JSON and no progress.")),
}
REQUIRED = ("base", "data")


def command_of(settings: type[TrainSettings], run: Command, description: str) -> Callable[..., None]:
    """Return a function whose signature typer reads; `description` is its help."""

    def command(**given: Any) -> None:
        common = {name: given.pop(name) for name in COMMON}
        run(common, _told(settings, given))

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if name in REQUIRED else False if kind is bool else None,
            annotation=Annotated[kind, option],
        )
        for name, (kind, option) in COMMON.items()
    ]
    parameters += [_parameter(settings, name, field) for name, field in settings.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = description
    return command


def _parameter(settings: type[TrainSettings], name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field's option, whose default is None: if it is not given, --config or the field's default applies."""
    extra = field.json_schema_extra
    panel = str(extra.get("panel")) if isinstance(extra, dict) else None
    flag = option_name(settings, name)
    kind = _kind(field.annotation)
    both = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag
    default = None if field.is_required() or field.default in (None, (), "", {}) else str(field.default)
    option = typer.Option(
        both, rich_help_panel=panel, help=field.description, show_default=False if default is None else default
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Union[kind, None], option],  # noqa: UP007
    )


def _kind(annotation: Any) -> Any:
    """Return the type of a field on the command line: `X | None` as X, tuples and tables as repeated options."""
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (member for member in get_args(annotation) if member is not type(None))
        return _kind(kind)
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    if get_origin(annotation) is dict:
        return list[str]
    return annotation


def _told(settings: type[TrainSettings], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, with NAME=VALUE parsed to tables."""
    return {
        name: _table(settings, name, value) if _is_table(settings, name) else value
        for name, value in given.items()
        if value is not None and value != []
    }


def _is_table(settings: type[TrainSettings], name: str) -> bool:
    return get_origin(settings.model_fields[name].annotation) is dict


def _table(settings: type[TrainSettings], name: str, lines: list[str]) -> dict[str, str]:
    for line in lines:
        if "=" not in line:
            raise InvalidRequest(f"{option_name(settings, name)} {line}: write PATTERN=VALUE", field=name)
    return {key: value for key, _, value in (line.rpartition("=") for line in lines)}
