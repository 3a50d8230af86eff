"""The receipt of a request: its fields, the versions that it used, the seeds, the engine and the timings.

The server makes one for each request, every image file has it as JSON, and `scumble.redraw` repeats the request.
Law: `Receipt.parse(data).to_json() == data` for every receipt of a server, in the same order of keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from scumble.errors import InvalidRequest

SCHEMA = 1


class _Part(BaseModel):
    """A part of a receipt. Fields of a newer server are preserved."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class BoundVersion(_Part):
    """The version of the registry that a reference resolved to."""

    name: str
    version: int
    digest: str
    """`sha256:…` of its manifest."""
    ref: str
    """The request's reference, e.g. `styles/ink@prod`; for base and VAE, that of the version."""


class BoundAdapter(BoundVersion):
    """An adapter that acted on the image."""

    kind: str
    weight: float
    text_weight: float
    layers: int | None = None
    """How many of the base's layers it was bound to; None for an embedding, which is no part of a layer."""

    @property
    def details(self) -> dict[str, JsonValue]:
        """The method's own keys, e.g. `rank` for a LoRA; in JSON they are beside the other keys."""
        return self.__pydantic_extra__


class DroppedAdapter(_Part):
    """An adapter of the request that was left out, because it would change nothing."""

    ref: str
    reason: str


class PictureInput(_Part):
    """An input image of the request: sha256 of its file, and its size in pixels."""

    digest: str
    width: int
    height: int


class TensorInput(_Part):
    """An input tensor of the request; `digest` is the sha256 of its bytes in a safetensors file."""

    digest: str
    shape: tuple[int, ...]
    dtype: str


class AskedAdapter(_Part):
    """An adapter as requested: the fields of `request.Adapter` that differ from their defaults."""

    ref: str


class AskedRequest(_Part):
    """The request with the base's defaults filled in. Inputs are given by their digests."""

    prompt: str
    negative_prompt: str | None
    base: str
    scheduler: str
    seed: int
    steps: int
    width: int
    height: int
    num_images: int
    guidance_scale: float
    adapters: tuple[AskedAdapter, ...]
    options: dict[str, JsonValue]
    """The fields of `request.Options` that differ from their defaults."""
    images: dict[str, PictureInput] = {}
    tensors: dict[str, TensorInput] = {}


class Receipt(_Part):
    """One request's receipt; in an image file also the image's index (`image`)."""

    schema_number: int = Field(alias="schema")
    """`SCHEMA`, if this client can read it."""
    request: AskedRequest
    base: BoundVersion
    vae: BoundVersion | None = None
    """The VAE that the request used instead of the base's."""
    adapters: tuple[BoundAdapter, ...]
    dropped: tuple[DroppedAdapter, ...]
    seeds: tuple[int, ...]
    """One for each image."""
    engine: dict[str, str]
    """Executor, device, precision, and the digests of engines."""
    timings_ms: dict[str, float]
    image: int | None = None

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Check the result of `json.loads`. Raises InvalidRequest that names what is missing or wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
            )
            raise InvalidRequest(f"the receipt is not complete: {problems}", field="from_receipt") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON: only the fields that are set, in order, and the method's own keys last."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def of_image(self, index: int) -> Self:
        """Return the receipt for the file of the image at this index."""
        return self.model_copy(update={"image": index})


def receipt_digest(receipt: Receipt) -> str:
    """Return `sha256:…` over everything that determines the images: equal for equal requests on equal weights."""
    plain = receipt.to_json()
    determined = {
        "request": {key: value for key, value in plain["request"].items() if key not in ("base", "adapters")},
        "base": receipt.base.digest,
        "adapters": [adapter | {"ref": adapter["ref"].partition("@")[2]} for adapter in pinned_adapters(receipt)],
        "seeds": plain["seeds"],
        "engine": plain["engine"],
    }
    canonical = json.dumps(determined, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def pinned_adapters(receipt: Receipt) -> list[dict[str, Any]]:
    """Return the adapters as requested, but pinned to digests, without those that were dropped."""
    digests = {bound.ref: bound.digest for bound in receipt.adapters}
    return [
        asked.model_dump(mode="json", exclude_unset=True) | {"ref": pin(asked.ref, digests[asked.ref])}
        for asked in receipt.request.adapters
        if asked.ref in digests
    ]


def pin(ref: str, digest: str) -> str:
    """Return the reference to exactly this version: `ns/name@sha256:…`."""
    name = ref.partition("@")[0]
    return f"{name}@sha256:{digest.removeprefix('sha256:')}"
