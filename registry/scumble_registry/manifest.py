"""The manifest of a version: one JSON document, whose sha256 is the version's digest.

Canonical form: keys sorted by code point, no white space, UTF-8 without escapes beyond JSON's own, no NaN,
optional fields without a value left out. Laws: `Manifest.parse(m.canonical()) == m`, and equal manifests have equal
bytes.

The manifest names every blob by digest and size, so the digest covers all content. It does not hold the name,
the version number, the time of publishing, aliases or status, which are in the database: the same content and
metadata have the same digest wherever and whenever they are published, which makes publishing idempotent.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from scumble.errors import IntegrityError, InvalidRequest, Refused
from scumble.request import SchedulerName, TimestepSpacing
from scumble_registry.blob import Blob
from scumble_registry.compatibility import BaseCompatibility, StoredCompatibility
from scumble_registry.references import parse_digest

_MAX_BYTES = 8 << 20
_SAID_OR_ABSENT = frozenset({"training", "leftover"})
"""Fields that the first manifests did not have: left out where they are empty, so that older digests do not change."""


class Defaults(BaseModel):
    """A base's values for the fields that a request leaves out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0, le=100, allow_inf_nan=False)
    scheduler: SchedulerName
    width: int = Field(ge=8, le=2048, multiple_of=8)
    height: int = Field(ge=8, le=2048, multiple_of=8)


class Sampling(BaseModel):
    """How an adapter is meant to be sampled (a few-step LoRA, say). None leaves a field to the request and the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: SchedulerName | None = None
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    timestep_spacing: TimestepSpacing | None = None
    rescale_betas: bool | None = None
    eta: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _options_have_their_scheduler(self) -> Sampling:
        if not self.model_dump():
            raise ValueError("it has no field set; leave it out")
        if self.scheduler is None and self.model_dump(include={"timestep_spacing", "rescale_betas", "eta"}):
            raise ValueError("timestep_spacing, rescale_betas and eta belong to a scheduler; name it")
        return self

    @model_serializer(mode="wrap")
    def _what_is_said(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialise only the fields that are set, so that a new field changes no older digest."""
        return {name: value for name, value in serialise(self).items() if value is not None}

    @classmethod
    def parse(cls, data: Any) -> Sampling:
        """Validate `data`. Raises InvalidRequest naming the field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            paths = [".".join(["sampling", *map(str, item["loc"])]) for item in error.errors()]
            text = "; ".join(f"{path}: {item['msg']}" for path, item in zip(paths, error.errors(), strict=True))
            raise InvalidRequest(text, field=paths[0]) from error


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    files: dict[str, Blob]
    """Path (with '/') → blob, exactly as published."""
    record: Blob | None = None
    """The normalised form that the server reads; bases have none."""
    compatibility: StoredCompatibility
    """Derived from the files, never taken from what the publisher states."""
    defaults: Defaults | None = None
    sampling: Sampling | None = None
    """Values for the fields that a request with this adapter leaves out; they precede the base's defaults."""
    base: str | None = None
    """Digest of the base that an adapter was published for and checked against."""
    image_encoder: str | None = None
    """Digest of the image encoder that an IP-Adapter was published with and checked against; None: it is among the
    adapter's own files, or the base's is used."""
    dialect: str | None = Field(default=None, max_length=100)
    """The tool whose layout the published files had, in a word or two, for people; None: the kind's own authors'."""
    training: dict[str, JsonValue] = Field(default_factory=dict)
    """The files' own statements on their training, bounded and unchecked (`formats/training_metadata.py`)."""
    leftover: tuple[str, ...] = ()
    """Unknown keys of the files that the record leaves out, because the publisher allowed it."""
    trigger_words: tuple[str, ...] = ()
    license: str | None = None
    description: str = ""
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """By convention: trainer, config, data_digest, seed, parent, libraries, time, peak_memory; for imports, source
    (`sources/`)."""
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    sample_grid: Blob | None = None
    card: Blob | None = None
    """The model card, README.md, as its trainer or publisher wrote it."""

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, files: dict[str, Blob]) -> dict[str, Blob]:
        for name in files:
            parts = name.split("/")
            if not name or "\\" in name or "\0" in name or {"", ".", ".."} & set(parts):
                raise ValueError(f"{name!r} is not a path inside the folder")
        return files

    @property
    def kind(self) -> str:
        return self.compatibility.kind

    def as_base(self, name: str = "this") -> BaseCompatibility:
        """Return the compatibility of a base. Raises Refused for another kind, calling the version `name`."""
        if not isinstance(self.compatibility, BaseCompatibility):
            raise Refused(f"{name} is a {self.kind}, not a base; name a base", ref=name)
        return self.compatibility

    @property
    def blobs(self) -> dict[str, Blob]:
        """Every blob that this version needs, by the name that error messages use for it."""
        extra = {"(record)": self.record, "(sample grid)": self.sample_grid, "(card)": self.card}
        return self.files | {word: blob for word, blob in extra.items() if blob is not None}

    def canonical(self) -> bytes:
        data = self.model_dump(mode="json")
        absent = {key for key, value in data.items() if value is None or (key in _SAID_OR_ABSENT and not value)}
        return canonical_json({key: value for key, value in data.items() if key not in absent})

    @property
    def digest(self) -> str:
        return digest_of(self.canonical())

    def fits(self, base: Manifest) -> None:
        """Check the fit. Raises Incompatible, naming the first target that differs, or Refused if `base` is no base."""
        self.compatibility.fits(base.as_base())

    @classmethod
    def parse(cls, text: bytes, digest: str) -> Manifest:
        """Parse a stored manifest. Raises IntegrityError if its sha256 is not `digest`, Refused for a newer schema."""
        if digest_of(text) != parse_digest(digest):
            raise IntegrityError(
                f"the manifest of {digest} has been altered (it hashes to {digest_of(text)}); restore a backup",
                digest=digest,
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise Refused(f"manifest {digest} was written by a newer scumble; upgrade to read it") from error


def canonical_json(data: Any) -> bytes:
    """Return canonical JSON. Raises InvalidRequest for values without JSON form (NaN, infinities, lone surrogates)."""
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        encoded = text.encode()
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"metadata must be plain JSON with finite numbers: {error}", field="metadata") from error
    if len(encoded) > _MAX_BYTES:
        raise InvalidRequest(f"the manifest has {len(encoded)} bytes; at most {_MAX_BYTES}", field="metadata")
    return encoded


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
