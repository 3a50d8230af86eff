"""`import`: publish files from the Hub or the web."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from scumble_registry.cli.options import Home, Json, open_registry
from scumble_registry.cli.printing import print_version
from scumble_registry.cli.publish import derived
from scumble_registry.cli.publish_options import PublishOptions, with_publish_options

app = typer.Typer()


@app.command("import")
@with_publish_options
def import_(
    source: Annotated[
        str, typer.Argument(help="hf:owner/repo\\[@revision]\\[/file-or-folder], or https://…", metavar="SOURCE")
    ],
    options: PublishOptions,
    include: Annotated[
        list[str] | None, typer.Option(help="Files of the repository to take, e.g. '*.safetensors'; may be repeated.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="The sha256 that the file must have.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fetch from the Hugging Face Hub or the web, and publish. Tokens: HF_TOKEN, CIVITAI_TOKEN."""
    from scumble_registry.importing import import_from

    if as_json or not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with open_registry(home, create=True) as registry:
        version = import_from(registry, source, include=include or (), sha256=sha256, **options.arguments(registry))
    print_version(version, as_json, f"{version.ref} ({version.status}) {version.digest}\n{derived(version)}")
