"""`scumble build engine`, `engines` and `pull` as they are typed, with TensorRT for RTX on tiny graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scumble.errors import InvalidRequest, NotFound, Refused, ScumbleError
from scumble_build.cli import app
from scumble_registry import Registry
from support.control_nets import load_unet, make_net, make_union
from support.tensorrt_here import needs_rtx
from support.tiny_variant import make_checkpoint

pytestmark = needs_rtx
RTX = ("--flavour", "tensorrt_rtx", "--sm", "89")


@pytest.fixture(scope="module")
def home(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, made = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("made")
    unet = load_unet(tiny_base)
    make_net(unet, 1).save_pretrained(made / "net")
    make_union(unet, 2).save_pretrained(made / "union")
    make_checkpoint(tiny_base, made / "tuned", seed=3, components=("unet",))
    with Registry.open(home, create=True) as registry:
        registry.publish(tiny_base, "tiny/base")
        registry.publish(made / "net", "c/net", base="tiny/base")
        registry.publish(made / "union", "c/union", base="tiny/base")
        registry.publish(made / "tuned", "d/tuned", base="tiny/base")
    return home


def build(home: Path, *words: str) -> Any:
    """What it prints as JSON."""
    arguments = [*words, "--home", str(home), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    return json.loads(done.stdout)


def digest(home: Path, ref: str) -> str:
    with Registry.open(home) as registry:
        return registry.resolve(ref).digest


def test_a_bases_engine_is_built_once_listed_and_pulled(home: Path, tmp_path: Path) -> None:
    asked = ("engine", "--base", "tiny/base", *RTX, "--part", "kv_projection")
    (first,) = build(home, *asked)["engines"]
    assert first["of"] == digest(home, "tiny/base")
    assert build(home, *asked)["engines"] == [first], "there already"
    assert first in build(home, "engines", "--base", "tiny/base")
    (pulled,) = build(home, "pull", "--base", "tiny/base", *RTX, "-o", str(tmp_path / "engines"))
    assert pulled["digest"] == first["digest"]
    assert {file.name for file in (tmp_path / "engines").iterdir()} == {"kv_projection.plan", "kv_projection.json"}
    with pytest.raises(Refused, match="is not an empty folder"):
        build(home, "pull", "--base", "tiny/base", *RTX, "-o", str(tmp_path / "engines"))
    other = ("--flavour", "tensorrt_rtx", "--sm", "75")
    there_are = r"tiny/base@1 has no engine for tensorrt_rtx .*SM75 fp16, only for tensorrt_rtx .*SM89 fp16; build one"
    with pytest.raises(NotFound, match=there_are):
        build(home, "pull", "--base", "tiny/base", *other, "-o", str(tmp_path / "none"))


def test_a_controlnets_engines_are_bound_to_the_net(home: Path, tmp_path: Path) -> None:
    found = build(home, "engine", "--base", "tiny/base", "--controlnet", "c/net", *RTX)["engines"]
    assert {each["key"]["part"] for each in found} == {"controlnet", "controlnet_kv", "controlnet_hint"}
    assert {each["of"] for each in found} == {digest(home, "c/net")}
    out = str(tmp_path / "engines")
    pulled = build(home, "pull", "--base", "tiny/base", "--controlnet", "c/net", *RTX, "-o", out)
    assert {each["digest"] for each in pulled} == {each["digest"] for each in found}


def test_a_union_nets_engine_builds(home: Path) -> None:
    asked = ("engine", "--base", "tiny/base", "--controlnet", "c/union", *RTX)
    found = build(home, *asked, "--part", "controlnet", "--part", "controlnet_hint")["engines"]
    assert {each["of"] for each in found} == {digest(home, "c/union")}


def test_a_checkpoints_engine_is_bound_to_the_checkpoint(home: Path) -> None:
    asked = ("engine", "--base", "d/tuned", *RTX, "--part", "kv_projection")
    (found,) = build(home, *asked)["engines"]
    assert found["of"] == digest(home, "d/tuned")
    assert found not in build(home, "engines", "--base", "tiny/base")


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("engine", "--base", "c/net", *RTX), Refused, "c/net@1 is a controlnet, not a base or a checkpoint"),
        (("engine", "--base", "tiny/base", "--controlnet", "d/tuned", *RTX), Refused, "d/tuned@1 is not a ControlNet"),
        (("engine", "--base", "tiny/base", *RTX, "--part", "unet.tiny"), InvalidRequest, "there is no graph"),
        (("engine", "--base", "tiny/none", *RTX), NotFound, "tiny/none"),
        (
            ("pull", "--base", "tiny/base", *RTX, "--sm", "120", "-o", "nowhere"),
            InvalidRequest,
            "a machine has one compute capability",
        ),
    ],
)
def test_what_cannot_be_built_or_pulled_is_said(
    home: Path, words: tuple[str, ...], error: type[ScumbleError], says: str
) -> None:
    with pytest.raises(error, match=says):
        build(home, *words)
