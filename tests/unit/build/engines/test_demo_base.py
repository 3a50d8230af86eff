"""The demo base's graphs, and tiny ones of the other families, as TensorRT for RTX reads and builds them.

What it refuses breaks this, and so does a name, a dtype or a shape that is not what the manifest says. The largest
graph of the denoiser, which has all that the others have, is built of a tiny base; `make engines-demo` builds them all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scumble_build.engines.api import Flavour
from scumble_build.engines.base import BuildTarget, build_graphs
from scumble_build.engines.profiles import usual
from scumble_build.export.command import find_base, open_base
from scumble_build.export.manifest import GraphManifest, Precision
from scumble_build.export.write import write_graphs
from support.places import DEMO_BASE
from support.tensorrt_here import check_parses, needs_rtx
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_sd import make_tiny_base

pytestmark = needs_rtx
LARGEST = ("unet.full", "unet.every")


def exported(base: Path, folder: Path, graphs: tuple[str, ...], precision: Precision) -> list[GraphManifest]:
    found = find_base(str(base), folder)
    opened = open_base(found, precision)
    names = [name for name in graphs or opened.names if name in opened.names]
    return list(write_graphs(opened, names, folder, base=found.digest, family=found.family))


def check_build(base: Path, folder: Path, manifests: list[GraphManifest]) -> None:
    """As `scumble build engine` without a profile builds them."""
    shapes = usual(*find_base(str(base), folder).sides)
    target = BuildTarget(Flavour.TENSORRT_RTX, (89, 120), "fp16", shapes)
    for built in build_graphs(folder, manifests, target, folder / "plans"):
        assert built.plan.stat().st_size > 0
        assert built.report is not None
        assert built.report.memory["weights_bytes"] > 0
        assert built.key.sm == (89, 120)


def test_the_demo_bases_parts_build_for_two_generations_of_gpu(tmp_path: Path) -> None:
    every = open_base(find_base(str(DEMO_BASE), tmp_path), "fp16").names
    manifests = exported(DEMO_BASE, tmp_path, tuple(name for name in every if name not in LARGEST), "fp16")
    assert {"text_encoder", "kv_projection", "denoiser", "vae_decoder", "vae_encoder", "image_encoder"} == {
        manifest.part for manifest in manifests
    }
    check_build(DEMO_BASE, tmp_path, manifests)


def test_the_largest_graph_builds(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    check_build(base, tmp_path, exported(base, tmp_path, ("unet.every",), "fp16"))


@pytest.mark.parametrize(
    ("make", "graphs", "precision"),
    [
        (make_tiny_base, ("unet.full",), "fp16"),
        (make_tiny_base, ("unet.small", "text_encoder", "vae_decoder"), "bf16"),
        (make_tiny_base, ("unet.bare",), "fp32"),
        (make_tiny_sd2, ("unet.small",), "fp16"),
        (make_tiny_sdxl, ("text_encoder_2", "unet.small", "vae_decoder"), "fp16"),
    ],
)
def test_other_graphs_families_and_precisions_are_read_as_their_manifests_say(
    tmp_path: Path, make: Callable[[Path], Path], graphs: tuple[str, ...], precision: Precision
) -> None:
    for manifest in exported(make(tmp_path / "base"), tmp_path, graphs, precision):
        check_parses(tmp_path / manifest.onnx.name, manifest, Flavour.TENSORRT_RTX)
