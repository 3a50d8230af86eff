"""`import`: publish what lies on the Hub or on the web."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from scumble_registry.cli.options import (
    Alias,
    AllowLeftover,
    Averaged,
    Base,
    Description,
    Home,
    ImageEncoder,
    Json,
    Licence,
    Like,
    MaxSize,
    Name,
    Prediction,
    SampleGrid,
    SamplingText,
    Shortcut,
    Staged,
    Trigger,
    open_registry,
    read_sampling,
    read_size,
)
from scumble_registry.cli.printing import say
from scumble_registry.cli.publish import derived
from scumble_registry.formats.source import Hints

app = typer.Typer()


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="hf:owner/repo[@revision][/file-or-folder], or https://…", metavar="SOURCE")
    ],
    name: Name,
    base: Base = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Files of the repository to take, e.g. '*.safetensors'; may be repeated.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="What the file must hash to.")] = None,
    image_encoder: ImageEncoder = None,
    alias: Alias = None,
    licence: Licence = None,
    staged: Staged = False,
    trigger: Trigger = None,
    description: Description = "",
    sample_grid: SampleGrid = None,
    sampling: SamplingText = None,
    allow_leftover: AllowLeftover = False,
    max_size: MaxSize = None,
    like: Like = None,
    prediction: Prediction = None,
    averaged: Averaged = False,
    shortcut: Shortcut = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fetch from the Hugging Face Hub or the web, and publish. Tokens: HF_TOKEN, CIVITAI_TOKEN."""
    from scumble_registry.importing import import_from

    if as_json or not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with open_registry(home, create=True) as registry:
        version = import_from(
            registry,
            source,
            name,
            include=include or (),
            sha256=sha256,
            max_bytes=read_size(max_size),
            base=base,
            image_encoder=image_encoder,
            alias=alias,
            license=licence,
            staged=staged,
            trigger_words=trigger or (),
            description=description,
            sample_grid=sample_grid,
            sampling=read_sampling(sampling),
            allow_leftover=allow_leftover,
            hints=Hints(registry.folder_of(like), prediction, averaged, shortcut),
        )
    say(version, as_json, f"{version.ref} ({version.status}) {version.digest}\n{derived(version)}")
