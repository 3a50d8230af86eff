"""A receipt is found in what we wrote, and becomes the request that draws the same again."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scumble.errors import InvalidRequest, NotFound
from scumble.images import Images
from scumble.redraw import find_inputs, input_digests, read_receipt, request_from_receipt
from scumble.request import Adapter, Request
from support.receipts import BASE, INK, a_receipt, receipt_json


def test_a_receipt_becomes_its_request_with_every_reference_pinned() -> None:
    assert request_from_receipt(a_receipt()) == Request(
        prompt="a red apple",
        base=f"scumble/demo@{BASE}",
        scheduler="ddim",
        seed=5,
        steps=20,
        width=128,
        height=64,
        num_images=3,
        guidance_scale=5.5,
        adapters=(Adapter(ref=f"styles/ink@{INK}", weight=0.8, start=0.25),),
    )


def test_of_several_pictures_only_the_one_at_hand_is_asked_for() -> None:
    request = request_from_receipt(a_receipt(image=2))
    assert (request.seed, request.num_images) == (7, 1)


def test_a_receipt_is_read_from_a_png_a_receipt_file_and_the_output_of_json(tmp_path: Path) -> None:
    receipt = a_receipt()
    (png,) = Images(np.zeros((1, 8, 8, 3), np.uint8), receipt).save(tmp_path / "a.png")
    plain, printed = tmp_path / "receipt.json", tmp_path / "printed.json"
    plain.write_text(json.dumps(receipt.to_json()))
    printed.write_text(json.dumps({"files": ["a.png"], "receipt": receipt.to_json()}))
    assert read_receipt(png) == receipt.of_image(0)
    assert read_receipt(plain) == read_receipt(printed) == receipt


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema": 99}',
        b"\x89PNG\r\n\x1a\n",
        b'{"receipt": 3}',
        b"[" * 100_000,
    ],
)
def test_what_holds_no_receipt_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        read_receipt(file)
    assert caught.value.fields["field"] == "from_receipt"


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_receipt(tmp_path / "a.png")
    with pytest.raises(InvalidRequest):
        read_receipt(tmp_path)


def test_inputs_are_found_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "any name").write_bytes(b"picture")
    (tmp_path / "other").write_bytes(b"not it")
    values = np.arange(3, dtype=np.float32)
    save_file({"face": values, "other": values + 1}, tmp_path / "faces.safetensors")
    picture, face = (f"sha256:{hashlib.sha256(content).hexdigest()}" for content in (b"picture", values.tobytes()))
    places = [tmp_path / "folder", tmp_path / "other", tmp_path / "faces.safetensors"]
    assert find_inputs([picture, face], places) == {picture: b"picture", face: values.tobytes()}


def test_a_file_with_a_header_that_takes_seconds_is_passed_by(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    digest = f"sha256:{hashlib.sha256(values.tobytes()).hexdigest()}"
    for name, empty in (("few", 10), ("many", 20_000)):
        save_file({"x": values, **{f"t{i}": np.zeros(0, np.float32) for i in range(empty)}}, tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    assert find_inputs([digest], [tmp_path / "few.safetensors"]) == {digest: values.tobytes()}
    assert find_inputs([digest], [tmp_path / "many.safetensors"]) == {}


def test_a_receipt_with_inputs_becomes_the_request_that_brought_them() -> None:
    values = np.arange(4, dtype=np.float32).reshape(2, 2)
    picture, face = (f"sha256:{hashlib.sha256(content).hexdigest()}" for content in (b"picture", values.tobytes()))
    asked = {
        "prompt": "x",
        "adapters": [{"ref": "a/b", "images": ["style", "face"]}],
        "images": {"style": {"digest": picture, "width": 1, "height": 1}},
        "tensors": {"face": {"digest": face, "shape": [2, 2], "dtype": "float32"}},
    }
    bound = receipt_json()["adapters"][0] | {"ref": "a/b"}
    receipt = a_receipt(request=receipt_json()["request"] | asked, adapters=[bound])
    assert input_digests(receipt) == {picture: "style", face: "face"}
    request = request_from_receipt(receipt, {picture: b"picture", face: values.tobytes()})
    assert request.images == {"style": b"picture"}
    assert np.array_equal(request.tensors["face"], values)
    with pytest.raises(NotFound, match="--image FILE"):
        request_from_receipt(receipt, {picture: b"picture"})
