"""Receipts on the client's side: read from a file, and turned back into the request that draws the same."""

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
from scumble.request import Request

SCHEMA = 1
MAX_INPUT_BYTES = 256 << 20
"""No file larger than this is looked at as a request's picture."""


def read_receipt(path: Path) -> dict[str, Any]:
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
        receipt: dict[str, Any] = data.get("receipt", data)
        known = receipt["schema"] == SCHEMA
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            f"{path} holds no receipt; give a picture or a receipt file that `scumble generate` wrote",
            field="from_receipt",
        ) from error
    if not known:
        raise InvalidRequest(
            f"{path}: receipt of schema {receipt['schema']!r}, this client reads {SCHEMA}",
            field="from_receipt",
        )
    return receipt


def request_from_receipt(receipt: dict[str, Any], found: Mapping[str, bytes] | None = None) -> Request:
    """The request that draws the same again: every reference pinned to the digest that was bound.

    `found` are the encoded pictures and raw tensors that are at hand, by digest (see `find_inputs`). Of one picture
    out of several (`image` in a PNG's receipt) only that one is asked for.
    Raises InvalidRequest if the receipt lacks something, NotFound if an input is not at hand.
    """
    try:
        fields = dict(receipt["request"])
        fields["images"] = {name: _input(name, digest, found or {}) for name, digest in _digests(fields, "images")}
        fields["tensors"] = {
            name: _tensor(_input(name, described["digest"], found or {}), described)
            for name, described in fields.get("tensors", {}).items()
        }
        fields["base"] = _pin(receipt["base"]["ref"], receipt["base"]["digest"])
        fields["adapters"] = _pinned_adapters(receipt)
        if "vae" in receipt:
            fields["options"] = fields["options"] | {"vae": _pin(receipt["vae"]["ref"], receipt["vae"]["digest"])}
        if "image" in receipt:
            fields |= {"seed": receipt["seeds"][receipt["image"]], "num_images": 1}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"the receipt is not complete: {error!r}", field="from_receipt") from error
    return Request.parse(fields)


def input_digests(receipt: dict[str, Any]) -> dict[str, str]:
    """Digest → name of every picture and tensor that the request brought."""
    asked = receipt["request"]
    return {digest: name for kind in ("images", "tensors") for name, digest in _digests(asked, kind)}


def find_inputs(wanted: Collection[str], places: Iterable[Path]) -> dict[str, bytes]:
    """Digest → content, from `places`: files, or folders whose files are looked at (not those of their folders).

    A picture is a whole file, a tensor's bytes stand in a safetensors file.
    """
    found: dict[str, bytes] = {}
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if len(found) < len(wanted) and path.is_file() and path.stat().st_size <= MAX_INPUT_BYTES:
                for content in _contents(path):
                    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
                    if digest in wanted:
                        found[digest] = content
    return found


def _contents(path: Path) -> list[bytes]:
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return [content]
    try:
        return [values.tobytes() for values in load(content).values()]
    except (SafetensorError, KeyError, ValueError):
        return []  # somebody else's file, of types that numpy does not know


def _digests(asked: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    return [(name, described["digest"]) for name, described in asked.get(kind, {}).items()]


def _input(name: str, digest: str, found: Mapping[str, bytes]) -> bytes:
    if digest not in found:
        raise NotFound(
            f"the receipt's input {name!r} ({digest}) is not at hand; name its file with --image FILE",
            name=name,
            digest=digest,
        )
    return found[digest]


def _tensor(content: bytes, described: dict[str, Any]) -> NDArray[Any]:
    return np.frombuffer(content, np.dtype(described["dtype"])).reshape(described["shape"])


def receipt_digest(receipt: dict[str, Any]) -> str:
    """`sha256:…` over what determines the picture; the same request on the same weights has the same."""
    asked = {key: value for key, value in receipt["request"].items() if key not in ("base", "adapters")}
    determined = {
        "request": asked,
        "base": receipt["base"]["digest"],
        "adapters": [adapter | {"ref": _digest_of(adapter["ref"])} for adapter in _pinned_adapters(receipt)],
        "seeds": receipt["seeds"],
        "engine": receipt["engine"],
    }
    canonical = json.dumps(determined, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _pinned_adapters(receipt: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapters that were bound, as they were asked for; what was dropped at admission stays out."""
    digests = {bound["ref"]: bound["digest"] for bound in receipt["adapters"]}
    asked = receipt["request"]["adapters"]
    return [
        adapter | {"ref": _pin(adapter["ref"], digests[adapter["ref"]])}
        for adapter in asked
        if adapter["ref"] in digests
    ]


def _digest_of(pinned: str) -> str:
    return pinned.partition("@")[2]


def _pin(ref: str, digest: str) -> str:
    name = ref.partition("@")[0]
    return f"{name}@sha256:{digest.removeprefix('sha256:')}"
