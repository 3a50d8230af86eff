"""Read receipts from files, and turn them into the request that gives the same images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest, NotFound
from scumble.images import receipt_text
from scumble.receipt import SCHEMA, Receipt, TensorInput, pin, pinned_adapters
from scumble.request import Request
from scumble.tensors import load_bounded

MAX_INPUT_BYTES = 256 << 20
"""Larger files are not searched for a request's inputs."""
_MAX_HEADER_BYTES = 1 << 20
"""Nor are safetensors files with a larger header, of some 10,000 tensors."""


def read_receipt(path: Path) -> Receipt:
    """Read the receipt in an image file, in a `--receipt` file, or in the output of `scumble generate --json`.

    Raises NotFound if there is no file, InvalidRequest if it has no receipt of a known schema.
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
            f"{path} has no receipt; give an image or a receipt file that `scumble generate` wrote",
            field="from_receipt",
        ) from error
    if schema != SCHEMA:
        raise InvalidRequest(
            f"{path}: receipt of schema {schema!r}, but this client reads {SCHEMA}; upgrade scumble",
            field="from_receipt",
        )
    return Receipt.parse(receipt)


def request_from_receipt(receipt: Receipt, contents: Mapping[str, bytes] | None = None) -> Request:
    """Make the request that gives the same images, with every reference pinned to the digest that was used.

    `contents` are encoded input images and raw tensors by digest (see `find_inputs`). A receipt with `image`, of one
    image among several, gives a request for that image alone.
    Raises InvalidRequest if the receipt contradicts itself, NotFound if an input is missing.
    """
    asked, contents = receipt.request, contents or {}
    fields = asked.model_dump(mode="json", exclude_unset=True) | {
        "base": pin(receipt.base.ref, receipt.base.digest),
        "adapters": pinned_adapters(receipt),
        "images": {name: _input(name, image.digest, contents) for name, image in asked.images.items()},
        "tensors": {name: _tensor(name, tensor, contents) for name, tensor in asked.tensors.items()},
    }
    if receipt.vae is not None:
        fields["options"] |= {"vae": pin(receipt.vae.ref, receipt.vae.digest)}
    if receipt.image is not None:
        fields |= {"seed": _seed(receipt, receipt.image), "num_images": 1}
    return Request.parse(fields)


def input_digests(receipt: Receipt) -> dict[str, str]:
    """Return digest → name of every input image and tensor of the request."""
    images = {image.digest: name for name, image in receipt.request.images.items()}
    return images | {tensor.digest: name for name, tensor in receipt.request.tensors.items()}


def find_inputs(digests: Collection[str], paths: Iterable[Path]) -> dict[str, bytes]:
    """Search files, and the files directly in folders, and return digest → content.

    An image is a whole file; a tensor's bytes are in a safetensors file.
    """
    contents: dict[str, bytes] = {}
    for given in paths:
        for path in sorted(given.iterdir()) if given.is_dir() else [given]:
            if len(contents) < len(digests) and path.is_file() and path.stat().st_size <= MAX_INPUT_BYTES:
                for content in _contents(path):
                    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
                    if digest in digests:
                        contents[digest] = content
    return contents


def _contents(path: Path) -> list[bytes]:
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return [content]
    try:
        return [values.tobytes() for values in load_bounded(content, _MAX_HEADER_BYTES).values()]
    except ValueError:
        return []  # another file


def _input(name: str, digest: str, contents: Mapping[str, bytes]) -> bytes:
    if digest not in contents:
        raise NotFound(
            f"the receipt's input {name!r} ({digest}) was not found; name its file with --image FILE",
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
            f"the tensor {name!r} does not fit the receipt's shape and dtype: {error}", field="from_receipt"
        ) from error


def _seed(receipt: Receipt, image: int) -> int:
    if not 0 <= image < len(receipt.seeds):
        raise InvalidRequest(
            f"the receipt is of image {image} but has {len(receipt.seeds)} seeds; it was altered", field="from_receipt"
        )
    return receipt.seeds[image]
