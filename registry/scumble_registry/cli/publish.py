"""`publish` and `extract`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from scumble_registry import results
from scumble_registry.cli.options import Alias, Home, Json, PublishedName, Ref, open_registry
from scumble_registry.cli.printing import listed, plain, print_version
from scumble_registry.cli.publish_options import PublishOptions, with_publish_options
from scumble_registry.compatibility import LoraCompatibility
from scumble_registry.extract import extract
from scumble_registry.formats import FORMATS
from scumble_registry.store.catalogue import Version

app = typer.Typer()


@app.command(epilog="Kinds: " + "; ".join(f"{form.kind}: {form.hint}" for form in FORMATS) + ".")
@with_publish_options
def publish(
    path: Annotated[
        Path,
        typer.Argument(help="An adapter's file, or a folder (a base's, for example).", metavar="FILE-OR-DIR"),
    ],
    options: PublishOptions,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Publish a file or folder as the next version. Content that is published already gives its existing version.

    Of a folder that a training left (training.json), the adapter in it is published, with all that is said there.
    """
    with open_registry(home, create=True) as registry:
        if path.is_dir() and results.read_result(path) is not None:
            version = results.publish_result(registry, path, **options.arguments(registry))
        else:
            version = registry.publish(path, **options.arguments(registry))
    print_version(version, as_json, f"{version.ref} ({version.status}) {version.digest}\n{derived(version)}")


@app.command("extract")
def extract_factors(
    ref: Ref,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the factors; a higher rank keeps more.")],
    name: PublishedName,
    alias: Alias = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint's differences to its base as a LoRA, and print how much of them it keeps."""
    with open_registry(home) as registry, tempfile.TemporaryDirectory() as work:
        version = extract(registry, ref, rank, name, Path(work), alias=alias)
    metrics = version.manifest.metrics
    others = metrics["not_expressed"]
    share = f"{metrics['energy_kept']:.1%} of the change" if isinstance(metrics["energy_kept"], float) else ""
    more = f", without {len(others)} biases and norms" if isinstance(others, list) and others else ""
    print_version(version, as_json, f"{version.ref} ({version.status}) {version.digest}\nkeeps {share}{more}")


def derived(version: Version) -> str:
    """Return what was derived from the files, in a few lines."""
    manifest = version.manifest
    parts = [manifest.kind, plain(manifest.dialect or ""), f"for {manifest.compatibility.family}"]
    lines = [", ".join(part for part in parts if part and part != "for None")]
    if manifest.trigger_words:
        lines.append(f"trigger words: {listed(manifest.trigger_words)}")
    if manifest.sampling is not None:
        lines.append(f"sampling: {manifest.sampling.model_dump_json()}")
    if manifest.leftover:
        lines.append(f"left out: {len(manifest.leftover)} unknown keys: {listed(manifest.leftover)}")
    if isinstance(manifest.compatibility, LoraCompatibility) and manifest.compatibility.idle:
        lines.append("warning: every change in it is zero, so it changes no picture; were the trained weights saved?")
    return "\n".join(lines)
