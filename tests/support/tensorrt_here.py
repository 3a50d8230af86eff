"""TensorRT as it is installed on this machine, or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import Unavailable
from scumble_build.engines.api import Flavour, load
from scumble_build.engines.builder import parse_network
from scumble_build.engines.progress import BuildLog, logger
from scumble_build.export.manifest import GraphManifest


def is_installed(flavour: Flavour) -> bool:
    try:
        load(flavour)
    except Unavailable:
        return False
    return True


needs_rtx = pytest.mark.skipif(
    not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt_rtx is not installed (no wheel for this platform)"
)


def check_parses(onnx: Path, manifest: GraphManifest, flavour: Flavour) -> None:
    """Raises Refused if TensorRT does not take the graph, or reads it other than its manifest says."""
    trt, said = load(flavour), BuildLog()
    keep = logger(trt, said)
    parse_network(trt, trt.Builder(keep), onnx, manifest, keep, said)
