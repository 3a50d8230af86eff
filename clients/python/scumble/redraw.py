"""Receipts read from files, and turned back into the request that draws the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from scumble.errors import InvalidRequest, NotFound
from scumble.images import receipt_text
from scumble.receipt import SCHEMA, Receipt, TensorInput, pin, pinned_adapters
from scumble.request import Request

MAX_INPUT_BYTES = 256 << 20
"""No file larger than this is looked at as a request's picture."""


def read_receipt(path: Path) -> Receipt:
    """The receipt in a picture of ours, in a `--receipt` file, or in what `scumble generate --json` printed.

    Raises NotFound if there is no file, InvalidRequest if it holds no receipt of a schema we know.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"receipt {path} does not exist", path=str(path)) from error
    except OSError as error:
        raise InvalidRequest(f"receipt {path} cannot be read: {error.strerror}", field="from_receipt") from error
    text = receipt_text(path) if content.startswith((b"\x89PNG", b"RIFF", b"\xff\xd8")) else content
    try:
        data = json.loads(text)
        receipt = data.get("receipt", data)
        schema = receipt["schema"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            f"{path} holds no receipt; give a picture or a receipt file that `scumble generate` wrote",
            field="from_receipt",
        ) from error
    if schema != SCHEMA:
        raise InvalidRequest(f"{path}: receipt of schema {schema!r}, this client reads {SCHEMA}", field="from_receipt")
    return Receipt.parse(receipt)


def request_from_receipt(receipt: Receipt, contents: Mapping[str, bytes] | None = None) -> Request:
    """The request that draws the same again: every reference pinned to the digest that was bound.

    `contents` are the encoded pictures and raw tensors that are at hand, by digest (see `find_inputs`). Of one picture
    out of several (`image` in a PNG's receipt) only that one is asked for.
    Raises InvalidRequest if the receipt contradicts itself, NotFound if an input is not at hand.
    """
    asked, contents = receipt.request, contents or {}
    fields = asked.model_dump(mode="json", exclude_unset=True) | {
        "base": pin(receipt.base.ref, receipt.base.digest),
        "adapters": pinned_adapters(receipt),
        "images": {name: _input(name, picture.digest, contents) for name, picture in asked.images.items()},
        "tensors": {name: _tensor(name, tensor, contents) for name, tensor in asked.tensors.items()},
    }
    if receipt.vae is not None:
        fields["options"] |= {"vae": pin(receipt.vae.ref, receipt.vae.digest)}
    if receipt.image is not None:
        fields |= {"seed": _seed(receipt, receipt.image), "num_images": 1}
    return Request.parse(fields)


def input_digests(receipt: Receipt) -> dict[str, str]:
    """Digest → name of every picture and tensor that the request brought."""
    pictures = {picture.digest: name for name, picture in receipt.request.images.items()}
    return pictures | {tensor.digest: name for name, tensor in receipt.request.tensors.items()}


def find_inputs(wanted: Collection[str], places: Iterable[Path]) -> dict[str, bytes]:
    """Digest → content, from `places`: files, or folders whose files are looked at (not those of their folders).

    A picture is a whole file, a tensor's bytes stand in a safetensors file.
    """
    contents: dict[str, bytes] = {}
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if len(contents) < len(wanted) and path.is_file() and path.stat().st_size <= MAX_INPUT_BYTES:
                for content in _contents(path):
                    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
                    if digest in wanted:
                        contents[digest] = content
    return contents


def _contents(path: Path) -> list[bytes]:
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return [content]
    try:
        return [values.tobytes() for values in load(content).values()]
    except (SafetensorError, KeyError, ValueError):
        return []  # somebody else's file, of types that numpy does not know


def _input(name: str, digest: str, contents: Mapping[str, bytes]) -> bytes:
    if digest not in contents:
        raise NotFound(
            f"the receipt's input {name!r} ({digest}) is not at hand; name its file with --image FILE",
            name=name,
            digest=digest,
        )
    return contents[digest]


def _tensor(name: str, described: TensorInput, contents: Mapping[str, bytes]) -> NDArray[Any]:
    content = _input(name, described.digest, contents)
    try:
        return np.frombuffer(content, np.dtype(described.dtype)).reshape(described.shape)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"the receipt describes the tensor {name!r} as what it is not: {error}", field="from_receipt"
        ) from error


def _seed(receipt: Receipt, image: int) -> int:
    if not 0 <= image < len(receipt.seeds):
        raise InvalidRequest(
            f"the receipt is of picture {image} and has {len(receipt.seeds)} seeds", field="from_receipt"
        )
    return receipt.seeds[image]
