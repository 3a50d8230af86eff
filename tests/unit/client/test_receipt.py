"""A receipt keeps its JSON, and its digest covers what determines the picture."""

import json

import pytest

from scumble.errors import InvalidRequest
from scumble.receipt import Receipt, receipt_digest
from support.receipts import INK, a_receipt, a_receipt_of, golden_receipt, receipt_json


def test_a_receipt_is_written_again_byte_for_byte() -> None:
    """Order and spelling are what digests and other readers rely on."""
    golden = golden_receipt()
    receipt = Receipt.parse(json.loads(golden))
    assert json.dumps(receipt.to_json(), separators=(",", ":")) == golden
    assert json.dumps(receipt.of_image(1).to_json(), separators=(",", ":")) == golden[:-1] + ',"image":1}'
    assert receipt_digest(receipt) == "sha256:046cee7f34ed0b744515852510e35c08476519e9357666ca85b16395215e58a1"


def test_an_older_receipt_lacks_what_was_not_there_yet() -> None:
    """And has what is there no more: the request's empty inputs, and which prompts were cut."""
    data = receipt_json(truncated=None)
    assert Receipt.parse(data).to_json() == data
    assert "images" not in Receipt.parse(data).to_json()["request"]


@pytest.mark.parametrize("missing", ["request", "base", "adapters"])
def test_a_receipt_with_a_hole_is_refused(missing: str) -> None:
    data = receipt_json()
    del data[missing]
    with pytest.raises(InvalidRequest, match=f"not complete: {missing}"):
        Receipt.parse(data)


def test_the_digest_depends_on_what_determines_the_picture_alone() -> None:
    digest, base = receipt_digest(a_receipt()), receipt_json()["base"]
    assert receipt_digest(a_receipt(timings_ms={}, dropped=[])) == digest
    assert receipt_digest(a_receipt(base=base | {"ref": "other/name"})) == digest
    assert receipt_digest(a_receipt(base=base | {"digest": INK})) != digest
    assert receipt_digest(a_receipt(seeds=[6, 7, 8])) != digest
    assert receipt_digest(a_receipt_of(steps=21)) != digest
