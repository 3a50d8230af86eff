"""Commands that make versions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from scumble_registry.cli.options import Alias, Home, Json, PublishedName, Ref, open_registry
from scumble_registry.cli.printing import listed, plain, say
from scumble_registry.cli.publish_options import PublishOptions, with_publish_options
from scumble_registry.extract import extract
from scumble_registry.store.catalogue import Version

app = typer.Typer()


@app.command()
@with_publish_options
def publish(
    path: Annotated[
        Path,
        typer.Argument(help="An adapter's file, or a folder (of a base, say).", metavar="FILE-OR-DIR"),
    ],
    options: PublishOptions,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Publish a file or folder as the next version. The same content again gives the same version back."""
    with open_registry(home, create=True) as registry:
        version = registry.publish(path, **options.arguments(registry))
    say(version, as_json, f"{version.ref} ({version.status}) {version.digest}\n{derived(version)}")


@app.command("extract")
def extract_factors(
    ref: Ref,
    rank: Annotated[int, typer.Option(min=1, help="Columns of the factors; more keep more.")],
    name: PublishedName,
    alias: Alias = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint's differences to its base as a LoRA, and say how much of them it keeps."""
    with open_registry(home) as registry, tempfile.TemporaryDirectory() as work:
        version = extract(registry, ref, rank, name, Path(work), alias=alias)
    metrics = version.manifest.metrics
    left = metrics["not_expressed"]
    kept = f"{metrics['energy_kept']:.1%} of the change" if isinstance(metrics["energy_kept"], float) else ""
    more = f", without {len(left)} biases and norms" if isinstance(left, list) and left else ""
    say(version, as_json, f"{version.ref} ({version.status}) {version.digest}\nkeeps {kept}{more}")


def derived(version: Version) -> str:
    """What the files said, in a line or two."""
    manifest = version.manifest
    said = [manifest.kind, plain(manifest.dialect or ""), f"for {manifest.compatibility.family}"]
    lines = [", ".join(part for part in said if part and part != "for None")]
    if manifest.trigger_words:
        lines.append(f"trigger words: {listed(manifest.trigger_words)}")
    if manifest.sampling is not None:
        lines.append(f"sampling: {manifest.sampling.model_dump_json()}")
    if manifest.leftover:
        lines.append(f"left out, not understood: {len(manifest.leftover)} keys: {listed(manifest.leftover)}")
    return "\n".join(lines)
