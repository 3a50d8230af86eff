"""Pictures go through every door: the client, the command line, gRPC and HTTP of other people's clients."""

from __future__ import annotations

import base64
import json
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble import Adapter, Client, Done, Preview, Request
from scumble_server.triton.running import RunningServer
from support.every_kind import coarse_png

from .test_generate import generate, pixels, scumble

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 4, "guidance_scale": 5.0}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    path = tmp_path / "style.png"
    path.write_bytes(coarse_png(1))
    return path


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "shape.png"
    path.write_bytes(coarse_png(2))
    return path


def test_the_client_takes_files_and_gives_maps_back(client: Client, style: Path, shape: Path) -> None:
    drawn = client.images.generate(
        **PLAIN,
        adapters=[{"ref": "ip/base", "image": "style"}, {"ref": "c/net", "image": "shape", "preprocess": "invert"}],
        images={"style": style, "shape": Image.open(shape)},
        options={"return_maps": True},
    )
    assert drawn.maps is not None
    assert drawn.maps.shape == (1, 64, 64, 3)
    assert np.abs(drawn.maps[0].astype(int) - (255 - pixels(shape))).max() <= 1
    bare = client.images.generate(**PLAIN)
    assert np.abs(drawn.images.astype(int) - bare.images).max() > 10
    assert bare.maps is None


def test_json_over_http_carries_a_picture_as_data_url(server: RunningServer, client: Client) -> None:
    body = {
        **PLAIN,
        "adapters": json.dumps([{"ref": "ip/base", "image": "style"}]),
        "images": ["style", "data:image/png;base64," + base64.b64encode(coarse_png(1)).decode()],
    }
    call = urllib.request.Request(f"{server.http_url}/v2/models/scumble/generate", json.dumps(body).encode())
    with urllib.request.urlopen(call, timeout=60) as answer:
        receipt = json.loads(json.load(answer)["receipt"])
    request = Request(**PLAIN, adapters=(Adapter(ref="ip/base", image="style"),), images={"style": coarse_png(1)})
    ours = client.images.generate(request).receipt.to_json()
    assert receipt["request"]["images"] == ours["request"]["images"]
    assert receipt["adapters"] == ours["adapters"]


def test_previews_come_while_it_is_drawn(client: Client) -> None:
    events = list(client.images.stream(**{**PLAIN, "steps": 6}, options={"preview_every": 2}))
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(event.step, event.images.shape) for event in previews] == [(2, (1, 8, 8, 3)), (4, (1, 8, 8, 3))]
    assert isinstance(events[-1], Done)


def test_the_command_line_draws_with_pictures_and_again_from_the_receipt(
    server: RunningServer, style: Path, shape: Path, tmp_path: Path
) -> None:
    asked = ("a red apple", "--ip", f"ip/base={style}:0.8", "--control", f"c/net={shape}", "--steps", "4")
    first = generate(server, *asked, "-o", tmp_path / "a.png")
    assert {each["digest"] for each in first["receipt"]["request"]["images"].values()} == {
        each for adapter in first["receipt"]["adapters"] for each in adapter.get("pictures", [])
    } | {each["digest"] for name, each in first["receipt"]["request"]["images"].items() if "shape" in name}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "a.png", elsewhere / "a.png")
    again = ("--from-receipt", elsewhere / "a.png", "-o", tmp_path / "b.png")
    missing = scumble("generate", *again, "--url", server.grpc_url, "--json")
    assert (missing.returncode, json.loads(missing.stdout)["error"]["code"]) == (3, "not_found")
    renamed = style.rename(tmp_path / "another name.png")
    generate(server, *again, "--image", renamed, "--image", shape)
    assert np.abs(pixels(elsewhere / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


@pytest.mark.parametrize(
    ("status", "says", "arguments"),
    [
        (2, "names no image", ["--ip", "ip/base"]),
        (3, "cannot be read", ["--ip", "ip/base=missing.png"]),
        (2, "no picture that can be read", ["--control", f"c/net={__file__}"]),
        (2, "takes", ["--control", "ip/base=STYLE", "--adapter", "c/net"]),
    ],
)
def test_bad_pictures_have_their_exit_status(
    server: RunningServer, style: Path, tmp_path: Path, status: int, says: str, arguments: list[str]
) -> None:
    arguments = [argument.replace("STYLE", str(style)) for argument in arguments]
    done = scumble("generate", "x", *arguments, "-o", tmp_path / "a.png", "--url", server.grpc_url, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, says in error["message"] or "needs a picture" in error["message"]) == (status, True), error


def test_a_picture_to_begin_with_and_files_of_a_format(
    server: RunningServer, client: Client, style: Path, tmp_path: Path
) -> None:
    begin = {"image": "photo", "strength": 0.5}
    drawn = client.images.generate(**PLAIN, images={"photo": style}, options={**begin, "format": "webp"})
    (file,) = drawn.save(tmp_path / "a.webp")
    assert file.read_bytes() == drawn.encoded[0]
    with Image.open(file) as picture:
        assert picture.format == "WEBP"
    options = ("--init", style, "--option", "strength=0.5", "--guidance", "5", "--seed", "7", "--steps", "4")
    generate(server, "a red apple", *options, "-o", tmp_path / "b.png")
    pixels_of = client.images.generate(**PLAIN, images={"photo": style}, options=begin).images[0]
    assert np.abs(pixels(tmp_path / "b.png").astype(int) - pixels_of).max() <= 1
    generate(server, "--from-receipt", file, "--image", style, "-o", tmp_path / "c.webp")
    assert np.abs(pixels(tmp_path / "c.webp").astype(int) - pixels(file)).max() <= 1
