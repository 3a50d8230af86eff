"""The record of an embedding, made from every layout and read by the server.

A canonical safetensors file with one tensor for each text encoder:

    vectors.text_encoder      (n, D)     dtype as published
    vectors.text_encoder_2    (n, D')    SDXL's second, if there is one

Laws: `read_record(write_record(r)) == r` bit for bit, and equal records have equal bytes. The token is in the manifest,
as it is a name that does not change the vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np

from scumble.errors import IntegrityError, Refused
from scumble_registry.formats.safetensors_header import Array, read_header, read_tensors, write

MAX_VECTORS = 75
"""The most tokens of a prompt between its start and end tokens."""

MAX_VALUE = 1e3
"""The largest number of a vector."""
_METADATA = {"format": "scumble.textual_inversion.1"}
_PREFIX = "vectors."

TextualInversionRecord: TypeAlias = dict[str, Array]
"""Text encoder (`text_encoder`, `text_encoder_2`), sorted → vectors (n, D), n the same for all."""


def make_record(vectors: dict[str, Array]) -> TextualInversionRecord:
    """Check the vectors and return a record; a single vector may be (D,). Raises Refused, naming what is wrong."""
    record = {name: values[None] if values.ndim == 1 else values for name, values in sorted(vectors.items())}
    for values in record.values():
        if values.ndim != 2 or 0 in values.shape:
            raise Refused(f"the embedding has shape {values.shape}; it must be (vectors, width) or (width,)")
        if len(values) > MAX_VECTORS:
            raise Refused(f"the embedding has {len(values)} vectors; a prompt holds at most {MAX_VECTORS}")
        if not np.isfinite(values).all():
            raise Refused("the embedding holds NaN or infinite values; the training went wrong")
        if (largest := float(abs(values).max())) > MAX_VALUE:
            raise Refused(
                f"the embedding holds values up to {largest:g}, where words have less than 1 and {MAX_VALUE:g} is the "
                "most; the training went wrong"
            )
    if len({len(values) for values in record.values()}) != 1:
        counts = ", ".join(f"{len(values)} for {name}" for name, values in record.items())
        raise Refused(f"the embedding has {counts} vectors; every text encoder needs the same number")
    return record


def write_record(record: TextualInversionRecord) -> bytes:
    return write({_PREFIX + name: values for name, values in record.items()}, _METADATA)


def read_record(path: Path) -> TextualInversionRecord:
    """Read a record as read-only views of the mapped file. Raises IntegrityError if this is no record."""
    try:
        header = read_header(path)
        if header.metadata != _METADATA:
            raise Refused(f"its metadata is {header.metadata}, not {_METADATA}")
        tensors = read_tensors(path, header)
        if not tensors or not all(name.startswith(_PREFIX) for name in tensors):
            raise Refused(f"its tensors are {sorted(tensors)}")
        return make_record({name.removeprefix(_PREFIX): values for name, values in tensors.items()})
    except Refused as error:
        raise IntegrityError(f"{path} is not an embedding's record: {error}; clear the cache and try again") from error
