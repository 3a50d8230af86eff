"""The receipt: what was asked, what was bound, what was drawn and how long it took. It remakes the picture.

The server makes one for each request, every picture carries it as JSON, and `scumble.redraw` reads it again.
Law: `Receipt.parse(data).to_json() == data` for all that a server of ours wrote, in the same order of keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from scumble.errors import InvalidRequest

SCHEMA = 1


class _Part(BaseModel):
    """What a newer server says beside these fields is carried along."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class BoundVersion(_Part):
    """A version of the registry, as it was bound."""

    name: str
    version: int
    digest: str
    """`sha256:…` of its manifest, read back from what was bound."""
    ref: str
    """The reference that was asked for, e.g. `styles/ink@prod`; of base and VAE the version's own."""


class BoundAdapter(BoundVersion):
    """An adapter that took part in the picture."""

    kind: str
    weight: float
    text_weight: float

    @property
    def details(self) -> dict[str, JsonValue]:
        """What the adapter's method adds, e.g. `rank` for a LoRA; in JSON these stand beside the other keys."""
        return self.__pydantic_extra__


class DroppedAdapter(_Part):
    """An adapter that was asked for and would have changed nothing."""

    ref: str
    reason: str


class PictureInput(_Part):
    """A picture that the request brought: sha256 of its file, and its size in pixels."""

    digest: str
    width: int
    height: int


class TensorInput(_Part):
    """A tensor that the request brought; `digest` covers its bytes as safetensors holds them."""

    digest: str
    shape: tuple[int, ...]
    dtype: str


class AskedAdapter(_Part):
    """An adapter as it was asked for: the fields of `request.Adapter` that differ from their defaults."""

    ref: str


class AskedRequest(_Part):
    """The request with the base's defaults filled in. Its inputs are named by their digests."""

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
    """One request's receipt; in a file with one picture also that picture's place (`image`)."""

    schema_number: int = Field(alias="schema")
    """`SCHEMA`, where this client can read it."""
    request: AskedRequest
    base: BoundVersion
    vae: BoundVersion | None = None
    """The one that was asked for in place of the base's own."""
    adapters: tuple[BoundAdapter, ...]
    dropped: tuple[DroppedAdapter, ...]
    seeds: tuple[int, ...]
    """One for each picture."""
    engine: dict[str, str]
    """Executor, device, precision, and the digests of engines."""
    timings_ms: dict[str, float]
    image: int | None = None

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Check what `json.loads` gave. Raises InvalidRequest that names what is missing or wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
            )
            raise InvalidRequest(f"the receipt is not complete: {problems}", field="from_receipt") from error

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: only what was set, in the order of the fields, a method's own keys last."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def of_image(self, index: int) -> Self:
        """The receipt that a file with the picture at this place carries."""
        return self.model_copy(update={"image": index})


def receipt_digest(receipt: Receipt) -> str:
    """`sha256:…` over what determines the picture; the same request on the same weights has the same."""
    said = receipt.to_json()
    determined = {
        "request": {key: value for key, value in said["request"].items() if key not in ("base", "adapters")},
        "base": receipt.base.digest,
        "adapters": [adapter | {"ref": adapter["ref"].partition("@")[2]} for adapter in pinned_adapters(receipt)],
        "seeds": said["seeds"],
        "engine": said["engine"],
    }
    canonical = json.dumps(determined, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def pinned_adapters(receipt: Receipt) -> list[dict[str, Any]]:
    """The adapters that were bound, as they were asked for but by digest; what was dropped at admission stays out."""
    digests = {bound.ref: bound.digest for bound in receipt.adapters}
    return [
        asked.model_dump(mode="json", exclude_unset=True) | {"ref": pin(asked.ref, digests[asked.ref])}
        for asked in receipt.request.adapters
        if asked.ref in digests
    ]


def pin(ref: str, digest: str) -> str:
    """The same name at exactly this version: `ns/name@sha256:…`."""
    name = ref.partition("@")[0]
    return f"{name}@sha256:{digest.removeprefix('sha256:')}"
