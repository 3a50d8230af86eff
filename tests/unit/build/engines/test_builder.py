"""A graph becomes a plan on a machine without a GPU, and only what the manifest promises is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import Cancelled, InvalidRequest, Refused, Unavailable
from scumble_build.engines.api import Flavour
from scumble_build.engines.builder import Report, build
from scumble_build.engines.profiles import WHOLE, Profile, Range
from scumble_build.export.manifest import GraphManifest, Port
from support.tensorrt_here import is_installed, needs_rtx
from support.tiny_graph import make_graph


def rtx(
    folder: Path, sm: tuple[int, ...] = (89,), profiles: tuple[Profile, ...] = (WHOLE,), **changed: object
) -> Report:
    onnx, manifest = make_graph(folder, **changed)
    plan = folder / "engine.plan"
    return build(onnx, GraphManifest.read(manifest), plan, flavour=Flavour.TENSORRT_RTX, sm=sm, profiles=profiles)


@needs_rtx
@pytest.mark.parametrize("sm", [(89,), (120,), (89, 120)])
def test_a_graph_becomes_a_plan_without_a_gpu(tmp_path: Path, sm: tuple[int, ...]) -> None:
    report = rtx(tmp_path, sm, (WHOLE, Profile({"rows": Range(2, 2, 2)})))
    assert (tmp_path / "engine.plan").stat().st_size == report.plan_bytes > 0
    assert report.layers >= 2
    assert report.peak_bytes > report.plan_bytes
    assert report.memory["weights_bytes"] > 0
    assert not list(tmp_path.glob("*.part"))


@needs_rtx
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"outputs": (Port(name="z", dtype="float16", dims=("rows", "tokens", 16), about=""),)}, "outputs are"),
        ({"inputs": (Port(name="x", dtype="float16", dims=("rows", "tokens", 16), about=""),)}, "inputs are"),
        (
            {
                "inputs": tuple(
                    Port(name=name, dtype="float32", dims=("rows", "tokens", 16), about="") for name in ("x", "more")
                )
            },
            "input x is float16, not float32",
        ),
        (
            {
                "inputs": tuple(
                    Port(name=name, dtype="float16", dims=("rows", 8, 16), about="") for name in ("x", "more")
                )
            },
            "input more is",
        ),
    ],
)
def test_a_manifest_that_lies_is_refused_and_nothing_is_written(
    tmp_path: Path, changed: dict[str, object], says: str
) -> None:
    with pytest.raises(Refused, match=says):
        rtx(tmp_path, **changed)
    assert not (tmp_path / "engine.plan").exists()


@needs_rtx
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    onnx, manifest = make_graph(tmp_path)
    onnx.write_bytes(b"no graph")
    with pytest.raises(Refused, match="does not support the graph denoiser"):
        build(
            onnx,
            GraphManifest.read(manifest),
            tmp_path / "engine.plan",
            flavour=Flavour.TENSORRT_RTX,
            sm=(89,),
            profiles=(WHOLE,),
        )


@needs_rtx
def test_a_gpu_that_the_flavour_does_not_build_for_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not for SM90; there, build with --flavour tensorrt"):
        rtx(tmp_path, (90,))


@needs_rtx
def test_a_profile_outside_the_graph_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="denoiser takes 1 to 8 rows"):
        rtx(tmp_path, profiles=(Profile({"rows": Range(1, 2, 9)}),))


@needs_rtx
def test_progress_is_told_and_whoever_listens_can_stop_the_build(tmp_path: Path) -> None:
    onnx, manifest = make_graph(tmp_path)
    told: list[tuple[str, float]] = []

    def listen(phase: str, done: float) -> None:
        told.append((phase, done))
        if len(told) == 4:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        build(
            onnx,
            GraphManifest.read(manifest),
            tmp_path / "engine.plan",
            flavour=Flavour.TENSORRT_RTX,
            sm=(89,),
            profiles=(WHOLE,),
            progress=listen,
        )
    assert not (tmp_path / "engine.plan").exists()
    assert all(0 < done <= 1 for _, done in told)


@pytest.mark.skipif(is_installed(Flavour.TENSORRT), reason="TensorRT is installed here")
def test_a_flavour_that_is_not_installed_says_how_to_get_it(tmp_path: Path) -> None:
    onnx, manifest = make_graph(tmp_path)
    with pytest.raises(Unavailable, match="pip install tensorrt-cu13"):
        build(
            onnx,
            GraphManifest.read(manifest),
            tmp_path / "engine.plan",
            flavour=Flavour.TENSORRT,
            sm=(89,),
            profiles=(WHOLE,),
        )
