"""Options of several commands, and the functions that read their values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from scumble.errors import InvalidRequest, NotFound, Refused
from scumble_registry.compatibility import PredictionType
from scumble_registry.registry import Registry
from scumble_registry.store.paths import HomePaths, default_home

Home = Annotated[
    Path | None, typer.Option("--home", help="Where the registry is; by default $SCUMBLE_HOME or ~/.scumble.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Ref = Annotated[str, typer.Argument(help="ns/name, ns/name@7, ns/name@prod or ns/name@sha256:…", metavar="REF")]
PublishedName = Annotated[str, typer.Option(help="ns/name to publish as.")]
BaseRef = Annotated[str | None, typer.Option(help="The base to publish the adapter for, and to check it against.")]
ImageEncoder = Annotated[
    str | None, typer.Option(help="The image encoder of an IP-Adapter that has none among its files.")
]
Alias = Annotated[str | None, typer.Option(help="Also point this alias at the version.")]
License = Annotated[str | None, typer.Option("--license", help="SPDX identifier, e.g. Apache-2.0.")]
Staged = Annotated[bool, typer.Option("--staged", help="Do not approve it yet.")]
Trigger = Annotated[
    list[str] | None, typer.Option(help="A trigger word; may be repeated. An embedding's first one is its token.")
]
Description = Annotated[str, typer.Option(help="One or two sentences.")]
SampleGrid = Annotated[Path | None, typer.Option(help="An image that shows the adapter's effect.")]
SamplingText = Annotated[
    str | None,
    typer.Option(help="""How it is meant to be sampled: JSON or a file, e.g. '{"scheduler": "lcm", "steps": 4}'."""),
]
AllowLeftover = Annotated[
    bool,
    typer.Option(
        "--allow-leftover",
        help="Leave unknown keys out, and what they do to pictures with them; the manifest names them.",
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        help="The most bytes that the files may have, e.g. 500MB or 6GiB; by default the limit of their kind."
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        help="A folder in the diffusers layout, or a base, with the components that a single file lacks.",
        metavar="DIR-OR-REF",
    ),
]
Prediction = Annotated[
    PredictionType | None,
    typer.Option("--prediction-type", help="What a checkpoint's UNet predicts, if its file does not state it."),
]
Averaged = Annotated[bool, typer.Option("--ema", help="Use a checkpoint's averaged weights (EMA).")]
Shortcut = Annotated[
    bool | None, typer.Option(help="Whether a FaceID-Plus is a PlusV2; by default its header or file name decides.")
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def open_registry(home: Path | None, *, create: bool = False) -> Registry:
    return Registry.open(home or default_home(), create=create)


def registry_if_there(home: Path | None) -> Registry | None:
    """Open the registry; return None if there is none and `home` was not given."""
    if home is None and not HomePaths(default_home()).database.is_file():
        return None
    return open_registry(home)


def folder_of(like: str | None, registry: Registry | None) -> Callable[[], Path] | None:
    """Return what `Hints.like` takes, of a base or a folder. Raises NotFound, and Refused for anything else."""
    if like is None:
        return None
    if registry is None:
        folder = Path(like).expanduser()
        if not (folder / "model_index.json").is_file():
            raise Refused(f"there is no registry to look up the base {like} in; name a folder, or --home DIR")
        return lambda: folder
    return registry.folder_of(like)


def read_sampling(text: str | None) -> Any:
    """Parse JSON, or the file that `text` names. Raises InvalidRequest, NotFound."""
    if text is None:
        return None
    try:
        return json.loads(text if text.lstrip().startswith("{") else Path(text).read_bytes())
    except OSError as error:
        raise NotFound(f"--sampling: {text!r} is neither JSON nor a file that can be read") from error
    except ValueError as error:
        raise InvalidRequest(f"--sampling is not JSON: {error}", field="sampling") from error


def read_size(text: str | None) -> int | None:
    """Return bytes: `500MB` are 500 000 000, `2GiB` 2 · 2³⁰, a bare number is bytes. Raises InvalidRequest.

    >>> read_size("1.5 KiB"), read_size("2g")
    (1536, 2000000000)
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise InvalidRequest(f"--max-size: {text!r} is not a size; write 500MB or 6GiB", field="max_size")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()])
