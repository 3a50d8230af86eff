"""`scumble build export`: write a base's graphs as ONNX files with manifests, for engines and other runtimes.

torch is imported by what loads networks, not by `--help`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scumble.errors import InvalidRequest, NotFound, Refused
from scumble_build.export.manifest import GraphManifest, Precision
from scumble_build.graphs.families import FAMILIES
from scumble_registry import Registry, default_home
from scumble_registry.compatibility import BaseCompatibility, ControlNetCompatibility, DreamboothCompatibility, Family
from scumble_registry.compatibility.vae import vae_scale
from scumble_registry.formats import base as base_format
from scumble_registry.formats.source import Source

if TYPE_CHECKING:
    from scumble_build.export.control import NetGraphs
    from scumble_build.export.plan import BaseGraphs
    from scumble_build.export.write import Exportable


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A base or a checkpoint on disk in the diffusers layout. `digest` is its version's, or that of its files if it is
    not in a registry.
    """

    folder: Path
    digest: str
    family: Family

    @property
    def sides(self) -> tuple[int, int]:
        """Return the side of the latents that it was trained at, and the pixels of each."""
        unet, vae = (json.loads((self.folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae"))
        return int(unet["sample_size"]), vae_scale(vae)


def export(
    base: Annotated[str, typer.Option(help="The base or checkpoint: a reference, or a diffusers folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files; created if missing.")],
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only this graph (unet.small, vae_decoder, …); may be repeated. [default: all]"),
    ] = None,
    controlnet: Annotated[
        str | None, typer.Option(help="Export this ControlNet's graphs instead: a reference to a net for the base.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Floating point format of the graphs.")] = "fp32",
    int8: Annotated[
        Path | None,
        typer.Option(
            help="Compute the denoiser's products in int8, adapters unchanged. JSON with the largest magnitude of what "
            "each layer reads (docs/quantisation.md)."
        ),
    ] = None,
    home: Annotated[Path | None, typer.Option(help="The registry's folder. [SCUMBLE_HOME]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Write a base's graphs, with adapters as inputs, as ONNX files with weights and manifests."""
    from scumble_build.export.quantise import read_maxima
    from scumble_build.export.write import write_graphs

    def report(manifest: GraphManifest) -> None:
        if not as_json:
            print(f"{manifest.graph}: {len(manifest.inputs)} inputs, {manifest.onnx.size / 1e6:.1f} MB")

    if int8 is not None and precision != "fp32":
        raise InvalidRequest("--int8 needs --precision fp32: ONNX's scales are float32", field="int8")
    maxima = read_maxima(int8) if int8 is not None else None  # fail before minutes of work
    registry_home = home or default_home()
    folder = find_base(base, registry_home)
    graphs: Exportable = open_base(folder, precision)
    digest = folder.digest
    if controlnet is not None:
        graphs, digest = open_net(controlnet, folder, registry_home, precision)
    manifests = write_graphs(
        graphs, part or graphs.names, out, base=digest, family=folder.family, report=report, maxima=maxima
    )
    if as_json:
        print(json.dumps({"folder": str(out), "graphs": [manifest.graph for manifest in manifests]}))


def find_base(ref: str, home: Path) -> BaseFolder:
    """Find a base by folder or reference. Raises NotFound, Refused or IntegrityError."""
    folder = Path(ref).expanduser()
    if folder.is_dir():
        source = Source.scan(folder)
        examined, _ = base_format.examine(source)
        digest = hashlib.sha256()
        for name, file in source.files.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        return BaseFolder(folder, f"sha256:{digest.hexdigest()}", examined.family)
    if "/" not in ref or ref.startswith((".", "/", "~")):
        raise NotFound(f"{ref} is neither a folder nor a reference such as scumble/demo@1", ref=ref)
    with Registry.open(home) as registry:
        version = registry.resolve(ref)
        compatibility = version.manifest.compatibility
        if not isinstance(compatibility, BaseCompatibility | DreamboothCompatibility):
            raise Refused(
                f"{version.ref} is a {version.manifest.kind}, not a base or a checkpoint; name one of these", ref=ref
            )
        return BaseFolder(registry.materialise(version), version.digest, compatibility.family)


def open_base(base: BaseFolder, precision: Precision) -> BaseGraphs:
    """Load a base's networks. Raises Refused for one that is not whole."""
    from transformers import CLIPVisionModelWithProjection

    from scumble_build.export.graph import PRECISIONS
    from scumble_build.export.plan import BaseGraphs
    from scumble_build.graphs.loading import load_whole, loading
    from scumble_build.graphs.models import Models

    family, dtype = FAMILIES[base.family], PRECISIONS[precision]
    encoder = base.folder / "image_encoder"
    vision = None
    with loading(str(base.folder), base.digest):
        if (encoder / "config.json").is_file():
            vision = load_whole(CLIPVisionModelWithProjection, encoder, dtype)
        return BaseGraphs.of(Models.load(base.folder, family, dtype), family, precision, vision)


def open_net(ref: str, base: BaseFolder, home: Path, precision: Precision) -> tuple[NetGraphs, str]:
    """Load a published ControlNet; returns its graphs and digest. Raises NotFound, IntegrityError, or Refused for
    another kind of adapter.
    """
    from scumble_build.export.control import NetGraphs
    from scumble_build.graphs.control_models import load_net, load_union
    from scumble_build.graphs.loading import loading

    with Registry.open(home) as registry:
        version = registry.resolve(ref)
        compatibility = version.manifest.compatibility
        if not isinstance(compatibility, ControlNetCompatibility) or compatibility.form in {"t2i", "lllite"}:
            raise Refused(f"{version.ref} is not a ControlNet; name one, or leave --controlnet out", ref=ref)
        folder = registry.materialise(version)
    with loading(version.ref, version.digest):
        model = load_union(folder) if compatibility.form == "union" else load_net(folder, lambda: base.folder / "unet")
    return NetGraphs.of(model, precision), version.digest
